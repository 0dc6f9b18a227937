"""`Model.fit` on the digits, beside Keras's own AdamW: callbacks, checkpoints, mixed precision, several optimizers."""

import keras
import numpy as np
import pytest
from helpers.keras_runs import BOTH, IS_TORCH, digits, fit, look, looked, model_of, same

from adamw_numba.keras import AdamW

CLOSE = {"rtol": 2e-5}  # of losses: Keras computes its scalars in float32
OPTIONS = {
    "plain": {},
    "all": {"amsgrad": True, "global_clipnorm": 1.0, "use_ema": True, "weight_decay": 0.1, "loss_scale_factor": 4.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 100)},
}


def optimizer_of(cls, case="plain", **more):
    return cls(**{"learning_rate": 0.003} | OPTIONS[case] | more)


@pytest.mark.parametrize("case", OPTIONS)
def test_losses_of_keras(case):
    """Three epochs; with averages, which `fit` puts into the model at its end."""
    models = [model_of(optimizer_of(cls, case)) for cls in BOTH]
    ours, theirs = (fit(model, 3) for model in models)
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert ours[-1] < 0.5 * ours[0]
    for one, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_jit_compile_and_run_eagerly():
    options = {"jit_compile": False} if IS_TORCH else {"jit_compile": True}
    expected = fit(model_of(optimizer_of(AdamW), **options), 1)
    np.testing.assert_allclose(fit(model_of(optimizer_of(AdamW), run_eagerly=True), 1), expected, rtol=1e-5)


def test_callbacks_that_set_the_learning_rate():
    rates = []
    for cls in BOTH:
        model = model_of(optimizer_of(cls))
        plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=10.0)
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate if epoch < 3 else 0.01 / epoch)
        losses, found = [], []
        for callback, first in ((plateau, 0), (scheduler, 3)):
            note = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs, model=model, found=found: found.append(
                    float(look(model.optimizer.learning_rate))
                )
            )
            losses += fit(model, 3, [callback, note], first)
        rates.append(found)
        if cls is AdamW:
            expected = losses
    np.testing.assert_array_equal(*rates)
    assert len(set(rates[0])) > 3
    np.testing.assert_allclose(expected, losses, **CLOSE)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_a_run_resumes_bit_for_bit(case, tmp_path):
    """From the file of ModelCheckpoint, with its optimizer, found by the name it is registered under."""
    whole = model_of(optimizer_of(AdamW, case))
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    losses = fit(whole, 4, [saving])
    resumed = keras.saving.load_model(tmp_path / "2.keras")
    assert type(resumed.optimizer) is AdamW
    assert fit(resumed, 2, first=2) == losses[2:]
    same(resumed.optimizer.variables, whole.optimizer.variables)
    same(resumed.weights, whole.weights)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """Keras puts its loss scale around ours for float16; variables and state are float32."""
    losses = []
    for cls in BOTH:
        model = model_of(optimizer_of(cls), policy)
        losses.append(fit(model, 2))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    np.testing.assert_allclose(*losses, rtol=3e-3)  # a rounding of float32 may become one of 16 bits
    assert losses[0][1] < 0.7 * losses[0][0]


def test_a_loss_scale_that_overflows():
    """Keras leaves out the steps, and halves the scale: as often as with its own."""
    found = []
    for cls in BOTH:
        scaled = keras.optimizers.LossScaleOptimizer(optimizer_of(cls), initial_scale=2.0**24)
        model = model_of(scaled, "mixed_float16")
        fit(model, 1)
        found.append((int(scaled.inner_optimizer.iterations), float(look(scaled.dynamic_scale))))
    assert found[0] == found[1]
    assert 0 < found[0][0] < 45


def test_bfloat16_models_train():
    """With a master copy: Keras's own loses updates of a rate as small as this."""
    losses = {cls: fit(model_of(cls(3e-4), "bfloat16"), 2) for cls in BOTH}
    reference = fit(model_of(AdamW(3e-4)), 2)
    assert abs(losses[AdamW][-1] - reference[-1]) < 0.05
    assert losses[AdamW][-1] < losses[keras.optimizers.AdamW][-1] - 0.1


def test_frozen_layers():
    """Before the first step; on torch, where Keras allows it, also between epochs."""
    for cls in BOTH:
        model = model_of(optimizer_of(cls))
        model.layers[0].trainable = False
        before = looked(model.layers[0].weights)
        losses = fit(model, 1)
        same(model.layers[0].weights, before)
        if IS_TORCH:
            model.layers[1].trainable = False
            before = looked(model.layers[1].weights)
            losses += fit(model, 1)
            same(model.layers[1].weights, before)
        if cls is AdamW:
            expected = losses
    np.testing.assert_allclose(expected, losses, **CLOSE)


def test_averages_in_evaluations():
    found = []
    for cls in BOTH:
        model = model_of(optimizer_of(cls, use_ema=True, ema_momentum=0.9))
        swap = keras.callbacks.SwapEMAWeights()
        history = model.fit(
            *digits(), epochs=2, batch_size=32, shuffle=False, verbose=0, validation_data=digits(), callbacks=[swap]
        )
        found.append(history.history["val_loss"])
    np.testing.assert_allclose(*found, **CLOSE)


def test_several_optimizers():
    found = []
    for cls in BOTH:
        chosen = keras.optimizers.OptimizerMap(default_optimizer=cls(0.003))
        chosen["net/out/.*|out/.*"] = cls(0.03, weight_decay=0.1)
        model = model_of(keras.optimizers.MultiOptimizer(chosen))
        found.append(fit(model, 2))
        assert [int(each.iterations) for each in model.optimizer.optimizers] == [90, 90]
    np.testing.assert_allclose(*found, **CLOSE)


def test_a_loop_of_ones_own():
    """As Keras's guides write it, on each backend."""
    images, labels = digits()
    x, y = keras.ops.convert_to_tensor(images[:64]), keras.ops.convert_to_tensor(labels[:64])
    model = model_of(AdamW(0.01))
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer, losses = model.optimizer, []
    optimizer.build(model.trainable_variables)
    if IS_TORCH:
        for _ in range(5):
            model.zero_grad()
            loss = loss_of(y, model(x))
            loss.backward()
            optimizer.apply([v.value.grad for v in model.trainable_weights], model.trainable_weights)
            losses.append(float(loss.detach()))
    else:
        import jax

        def loss_and_state(trainable, fixed):
            logits, fixed = model.stateless_call(trainable, fixed, x)
            return loss_of(y, logits), fixed

        @jax.jit
        def step(trainable, fixed, state):
            (loss, fixed), gradients = jax.value_and_grad(loss_and_state, has_aux=True)(trainable, fixed)
            trainable, state = optimizer.stateless_apply(state, gradients, trainable)
            return loss, trainable, fixed, state

        trainable, fixed, state = (
            [v.value for v in own]
            for own in (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        )
        for _ in range(5):
            loss, trainable, fixed, state = step(trainable, fixed, state)
            losses.append(float(loss))
        assert step._cache_size() == 1
    assert losses == sorted(losses, reverse=True)
