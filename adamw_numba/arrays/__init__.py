"""What an array is, for arrays of any library: what it is called, where it lies, what is refused, how it is copied."""

from .checks import check_gradient, check_tensor, check_variable, check_variables, read_directly
from .foreign import origin, seen, seen_again, seen_all
from .layout import Layout, address, extent, is_c_contiguous, layout_of, memory, share_memory, signature
from .library import (
    COMPUTE,
    ITEMSIZE,
    SLOT,
    Array,
    are_arrays,
    byte_count,
    device,
    dtype_name,
    family,
    has_dtype,
    has_version,
    is_array,
    is_complex,
    is_mutable,
    library_name,
    namespace,
    place,
)
from .transfer import (
    as_numpy,
    bits,
    cast,
    check_writeable,
    copied,
    detached,
    like,
    note_writes,
    on_all_devices,
    to_numpy,
    write,
    write_all,
    writeable_copy,
    zeros_beside,
    zeros_like,
    zeros_of,
)
