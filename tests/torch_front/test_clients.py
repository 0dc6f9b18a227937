"""Training by other packages, as with torch's own optimizer: without a stop, and resumed from what they have saved.

Each client trains in two halves, saves between them, and returns the losses and the final weights. With `resume` it
starts from what was saved in the same folder, with everything new, and does the second half only.
"""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from helpers.torch_clients import (
    BOTH,
    DTYPES,
    OPTIONS,
    WARNINGS,
    AdamW,
    assert_close,
    groups_of,
    model_of,
    numbers,
    weights_of,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

HALF = 2  # epochs
pytestmark = [pytest.mark.usefixtures("one_thread"), *WARNINGS]


def batches(dtype):
    return DataLoader(TensorDataset(*numbers(dtype)), batch_size=8)


def epochs(resume, save):
    for epoch in range(HALF if resume else 0, 2 * HALF):
        if epoch == HALF and not resume:
            save()
        yield epoch


def result(losses, model):
    weights = weights_of(model)
    return [torch.tensor(losses, dtype=weights[0].dtype), *weights]


def lightning(optimizer_class, dtype, folder, resume, by_hand=False, **options):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model_of(dtype), []
            self.automatic_optimization = not by_hand

        def training_step(self, batch):
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            if by_hand:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
            return loss

        def on_train_epoch_end(self):
            if by_hand:
                self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = optimizer_class(groups_of(self.model), **OPTIONS)
            return [optimizer], [ExponentialLR(optimizer, 0.8)]

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2 * HALF,
        default_root_dir=folder,
        callbacks=pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Module()
    trainer.fit(module, batches(dtype), ckpt_path=folder / f"epoch={HALF - 1}.ckpt" if resume else None)
    return result(module.losses, module)


def transformers(optimizer_class, dtype, folder, resume, as_class=False):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    # No bias in its attention: the gradient of a key's bias is 0 but for rounding, which Adam makes a whole step of.
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    rows = torch.randint(16, (32, 8))
    if as_class:
        optimizer = {"optimizer_cls_and_kwargs": (optimizer_class, OPTIONS)}
    else:
        built = optimizer_class(groups_of(model), **OPTIONS)
        optimizer = {"optimizers": (built, ExponentialLR(built, 0.8))}
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, **optimizer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return result([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model)


def accelerate(optimizer_class, dtype, folder, resume):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = model_of(dtype)
    optimizer = optimizer_class(groups_of(model), **OPTIONS)
    model, optimizer, data, scheduler = accelerator.prepare(
        model, optimizer, batches(dtype), ExponentialLR(optimizer, 0.8)
    )
    if resume:
        accelerator.load_state(folder)
    losses = []
    for _ in epochs(resume, lambda: accelerator.save_state(folder)):
        for inputs, classes in data:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(inputs), classes)
                losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return result(losses, model)


def skorch(optimizer_class, dtype, folder, resume, regress=False, pickled=False):
    skorch = pytest.importorskip("skorch")
    net = (skorch.NeuralNetRegressor if regress else skorch.NeuralNetClassifier)(
        partial(model_of, dtype),
        criterion=torch.nn.MSELoss if regress else torch.nn.CrossEntropyLoss,
        optimizer=optimizer_class,
        optimizer__weight_decay=OPTIONS["weight_decay"],
        optimizer__param_groups=[("*.bias", {"weight_decay": 0.0})],
        lr=OPTIONS["lr"],
        max_epochs=HALF,
        batch_size=8,
        train_split=None,
        callbacks=[("schedule", skorch.callbacks.LRScheduler(LambdaLR, lr_lambda=lambda_of_epoch))],
        verbose=0,
    )
    inputs, classes = (tensor.numpy() for tensor in numbers(dtype))
    data = inputs, np.tanh(inputs[:, :3]) if regress else classes
    files = {f"f_{kind}": folder / kind for kind in ("params", "optimizer", "history")}
    if resume and pickled:
        net = pickle.loads((folder / "net").read_bytes())
    elif resume:
        net.initialize().load_params(**files)
    else:
        net.fit(*data)
        net.save_params(**files)
        if pickled:
            (folder / "net").write_bytes(pickle.dumps(net))
    net.partial_fit(*data)
    return result(net.history[:, "train_loss"], net.module_)


def lambda_of_epoch(epoch):
    return 0.8**epoch


def an_epoch(model, optimizer, dtype):
    for inputs, classes in batches(dtype):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), classes)
        loss.backward()
        optimizer.step()
        yield loss.item()


def averaged(optimizer_class, dtype, folder, resume):
    """torch.optim.swa_utils"""
    model = model_of(dtype)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = optimizer_class(groups_of(model), **OPTIONS)
    anneal = SWALR(optimizer, swa_lr=0.005, anneal_epochs=3)
    parts = model, average, optimizer, anneal
    if resume:
        for part, state in zip(parts, torch.load(folder / "saved"), strict=True):
            part.load_state_dict(state)
    losses = []
    for _ in epochs(resume, lambda: torch.save([part.state_dict() for part in parts], folder / "saved")):
        losses += an_epoch(model, optimizer, dtype)
        average.update_parameters(model)
        anneal.step()
    return result(losses, model) + weights_of(average)


def by_name(optimizer_class, dtype, folder, resume):
    """torch.distributed.checkpoint, which knows the state of a parameter by its name, without a process group"""
    model = model_of(dtype)
    optimizer = optimizer_class(groups_of(model), **OPTIONS)
    if resume:
        weights, state = torch.load(folder / "saved")
        model.load_state_dict(weights)
        set_optimizer_state_dict(model, optimizer, state)

    def save():
        torch.save((model.state_dict(), get_optimizer_state_dict(model, optimizer)), folder / "saved")

    losses = [loss for _ in epochs(resume, save) for loss in an_epoch(model, optimizer, dtype)]
    return result(losses, model)


CLIENTS = {
    "Lightning": partial(lightning, gradient_clip_val=0.5),
    "Lightning, accumulating": partial(lightning, gradient_clip_val=0.5, accumulate_grad_batches=2),
    "Lightning, by hand": partial(lightning, by_hand=True),
    "transformers": transformers,
    "transformers, given the class": partial(transformers, as_class=True),
    "Accelerate": accelerate,
    "skorch": skorch,
    "skorch, regression": partial(skorch, regress=True),
    "skorch, pickled": partial(skorch, pickled=True),
    "swa_utils": averaged,
    "torch.distributed.checkpoint": by_name,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLIENTS)
def test_client(name, dtype, tmp_path):
    """As with torch's own; and resumed as if never stopped, also from what was saved with torch's own."""
    client = CLIENTS[name]
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    ours, theirs = (client(kind, dtype, folder, resume=False) for kind, folder in zip(BOTH, folders, strict=True))
    assert_close(ours, theirs)
    for folder, whole in zip(folders, (ours, theirs), strict=True):
        half = len(whole[0]) // 2
        resumed = client(AdamW, dtype, folder, resume=True)
        resumed[0], whole[0] = resumed[0][-half:], whole[0][-half:]  # some clients also remember the losses
        assert_close(resumed, whole, exact=whole is ours)


@pytest.mark.parametrize("gradient_clip_val", [None, 0.5])
def test_mixed_precision_of_lightning(gradient_clip_val, tmp_path):
    """With it, Lightning refuses to clip for an optimizer that says it unscales gradients itself."""
    options = {"precision": "bf16-mixed", "gradient_clip_val": gradient_clip_val}
    ours, theirs = (lightning(kind, torch.float32, tmp_path / str(i), False, **options) for i, kind in enumerate(BOTH))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # inputs of layers are rounded to 8 bits


def test_accelerate_says_which_step_was_skipped():
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # sets up what the next needs
    model, scaler = model_of(torch.float32), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(AdamW(model.parameters(), **OPTIONS), scaler=scaler)
    inputs, classes = numbers(torch.float32)
    skipped = []
    for factor in (1.0, np.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(inputs), classes) * factor).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [False, True, False]
