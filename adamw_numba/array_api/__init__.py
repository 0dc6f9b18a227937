"""Arrays of any other library: the plan of a step as whole-array functions, and the step as a pure function."""
