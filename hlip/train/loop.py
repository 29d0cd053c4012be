"""The training loop: accelerate for devices and precision, everything else in the open."""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..evaluate import Metrics
from ..losses import ContrastiveLoss
from ..model import HLIP, Tokenizer, load_checkpoint, load_mae
from ..progress import progress_bar
from .best import keep_best
from .config import TrainConfig
from .draws import Draws
from .examples import Batch, Collate, SimulatedExamples
from .folder import EVENTS, check_folder, save_state, start_folder
from .inputs import make_datasets, make_tokenizer
from .processes import (
    Stopped,
    highest,
    ignore_stop_signals,
    main_says,
    make_accelerator,
    patient_group,
    said_once,
    stop_signals,
)
from .run import build_model, check_model, check_text_length, check_vocabulary, load_state, loss_kind, open_tokenizer
from .step import contrastive_step, random_state, set_random_state
from .validate import Validation

log = logging.getLogger(__name__)


class ShardedShuffle(Sampler):
    """A seeded shuffle of all examples per epoch, as ``(epoch, index)``, dealt out evenly to the processes.

    Can start in the middle of an epoch.
    """

    def __init__(self, size: int, *, seed: int, rank: int, world_size: int):
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.size // self.world_size - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        mine = order[self.rank : self.size - self.size % self.world_size : self.world_size]
        yield from ((self.epoch, index) for index in mine[self.skip :])


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Metrics | None:
    """Trains a model and writes a run folder (see :mod:`hlip.train.run`), with all processes of a ``torchrun`` together.

    What the config names is checked, built and restored before anything is written: a start that fails leaves an earlier
    run in the folder as it was.

    Args:
        config: everything.
        resume: go on from the folder's last saved state; without one, start anew and say so.
        overwrite: an earlier run in the folder may be replaced.
        progress: show a progress bar.

    Returns:
        The last zero-shot metrics, or ``None`` when there was nothing to evaluate on, and on all but the main process.

    Raises:
        FileNotFoundError, ValueError: the config, or what it names, cannot be used; or the folder holds a run that is
            neither to be resumed nor to be replaced, or that is of another model. OSError: the folder cannot be written.
    """
    from accelerate.utils import set_seed

    config.validate()
    check_model(config.model)
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    with said_once(accelerator):
        goes_on = check_folder(config, resume=resume, overwrite=overwrite)
        dataset, validation_set, prompts = make_datasets(config)
        validation = Validation.make(validation_set, prompts, config)
        tokenizer = open_tokenizer(Path(config.run), config.model) if goes_on else make_tokenizer(config, dataset)
    if isinstance(dataset, SimulatedExamples):
        for studies in (dataset.studies, validation_set):
            if studies is not None:
                studies.render_all(config.data.workers, progress=progress and accelerator.is_main_process)
    model = build_model(config.model, vocab_size=tokenizer.vocab_size)
    check_text_length(config.model, model)
    check_vocabulary(tokenizer, model)
    if config.model.mae:
        load_mae(model.visual.trunk, config.model.mae)
    if config.model.checkpoint:
        load_checkpoint(model, config.model.checkpoint)
    trainer = Trainer(config, accelerator, model, tokenizer, dataset, validation)
    if resume:
        trainer.resume()
    if accelerator.is_main_process:
        start_folder(config, None if goes_on else tokenizer)
    return trainer.run(progress=progress)


class Trainer:
    """One run. ``train`` makes it; use it directly to train a model or data of your own.

    Args:
        config: of the run. accelerator: ``accelerate.Accelerator``. model, tokenizer: matching.
        dataset: of :class:`hlip.train.examples.Example`, with their ``names`` if they have any.
        validation: what to evaluate on, or ``None``.
    """

    def __init__(self, config: TrainConfig, accelerator, model: HLIP, tokenizer: Tokenizer, dataset: Dataset, validation):
        self.config, self.accelerator, self.tokenizer, self.validation = config, accelerator, tokenizer, validation
        self.kind = loss_kind(config.model)
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.loss = ContrastiveLoss(self.kind, **ranks)
        self.sampler = ShardedShuffle(len(dataset), seed=config.seed, **ranks)
        modes = ("sentence", "report") if self.kind == "dual" else (config.text_mode,)
        # Simulated studies are in memory by now.
        workers = 0 if isinstance(dataset, SimulatedExamples) else config.data.workers
        self.loader = DataLoader(
            Draws(dataset, config.seed),
            batch_size=config.batch_size,
            sampler=self.sampler,
            drop_last=True,
            num_workers=workers,
            collate_fn=Collate(tokenizer, modes, config.prompt),
            worker_init_fn=ignore_stop_signals,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # what the loader draws for itself is not taken from the model's numbers
            pin_memory=accelerator.device.type == "cuda",
        )
        self.per_step = config.batch_size * config.accumulate
        self.steps_per_epoch = len(dataset) // accelerator.num_processes // self.per_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(dataset)} studies on {accelerator.num_processes} process(es) do not fill one batch of {self.per_step} "
                "(batch_size * accumulate): lower batch_size or add studies"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        if self.kind != "dual" and model.config.dual:
            model.logit_bias.requires_grad_(False)  # the report head's scale: DDP waits for the gradient of what is trained
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.patient = patient_group(accelerator)
        names = "\n".join(getattr(dataset, "names", ()))
        self.studies = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        self.step, self.seconds, self.saved = 0, 0.0, time.monotonic()  # seconds: trained by this process, since it started
        self.folder = Path(config.run)
        self.writer = None

    # ------------------------------------------------------------------ the loop

    def run(self, *, progress: bool = True) -> Metrics | None:
        """Trains to the end (or to ``max_minutes``), evaluating and saving on the way.

        Raises:
            Stopped: SIGTERM or SIGUSR1 came while training; the step was finished and saved, and nothing evaluated.
        """
        main = self.accelerator.is_main_process
        if main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / EVENTS))
        bar = progress_bar(total=self.total_steps, initial=self.step, unit="step", disable=not (progress and main))
        metrics, evaluated, started = None, -1, time.monotonic()
        if self.step >= self.total_steps:
            self._say(bar, f"{self.folder} has made all its {self.total_steps} steps: nothing is left to train")
        try:
            while self.step < self.total_steps and not self._late():
                with stop_signals() as came:
                    self._train_epoch(bar, started, came)
                    self.save()  # before anything else can go wrong
                    self._stop_if_asked(came)
                every = self.config.evaluate_every
                if every and self.step % (every * self.steps_per_epoch) == 0:
                    metrics, evaluated = self.evaluate(bar), self.step
            if self.step < self.total_steps:
                minutes = f"max_minutes = {self.config.max_minutes:g}"
                self._say(bar, f"stopped after step {self.step} of {self.total_steps} ({minutes}); resuming goes on from here")
            if evaluated != self.step:
                metrics = self.evaluate(bar)
        finally:
            bar.close()
            if self.writer is not None:
                self.writer.close()
        return metrics

    def _train_epoch(self, bar, started: float, came: list[int]) -> None:
        """The rest of an epoch, or what of it there is time for; ``came``: signals to stop."""
        epoch = self.step // self.steps_per_epoch
        self.sampler.epoch, self.sampler.skip = epoch, self.step % self.steps_per_epoch * self.per_step
        for batches in self._micro_batches():
            tic = time.monotonic()
            loss = self.train_step(batches)
            self.step += 1
            self.seconds = time.monotonic() - started
            self._show(bar, batches, loss, time.monotonic() - tic)
            if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps or self._late():
                break
            if highest(self.accelerator, len(came)):
                break
            if self._save_is_due():
                self.save()

    def train_step(self, batches: list[Batch]) -> float:
        """One optimiser step on one or more micro-batches; returns the loss, the same on every process."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)
        with self.accelerator.autocast():
            loss = contrastive_step(
                self.model, batches, self.loss, self.accelerator.backward,
                dual=self.kind == "dual", no_sync=self.accelerator.no_sync,
            )  # fmt: skip
        if self.config.clip_grad > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        # Each process has the loss of its own studies; what is shown, and whether the step is taken, is one for all.
        value = float(self.accelerator.reduce(loss, "mean"))
        if math.isfinite(value):
            self.optimizer.step()
        else:
            log.warning("step %d: the loss is %s; the step is skipped (studies: %s)", self.step, value,
                        ", ".join(name for b in batches for name in b.names[:4]))  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.unwrap_model(self.model).clamp_scales()
        return value

    def _micro_batches(self) -> Iterator[list[Batch]]:
        group = []
        for batch in self.loader:
            group.append(batch.to(self.accelerator.device))
            if len(group) == self.config.accumulate:
                yield group
                group = []

    def _stop_if_asked(self, came: list[int]) -> None:
        number = highest(self.accelerator, max(came, default=0))
        if number:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} after step {self.step} of {self.total_steps}, and saved; "
                "--resume goes on from there", number,
            )  # fmt: skip

    def _late(self) -> bool:
        """Whether time is up; like every decision by a clock, the main process's for all."""
        minutes = self.config.max_minutes
        return bool(minutes) and main_says(self.accelerator, self.seconds >= minutes * 60)

    def _save_is_due(self) -> bool:
        minutes = self.config.save_minutes
        return bool(minutes) and main_says(self.accelerator, time.monotonic() - self.saved > minutes * 60)

    def _wait(self) -> None:
        """Until every process is here, however long the main one evaluates or writes."""
        if self.patient is not None:
            torch.distributed.barrier(group=self.patient)

    def _say(self, bar, line: str) -> None:
        """A line from the main process: above the progress bar where there is one, or else into the log."""
        if self.accelerator.is_main_process:
            (bar.write if bar is not None and not bar.disable else log.info)(line)

    def _show(self, bar, batches: list[Batch], loss: float, seconds: float) -> None:
        processes = self.accelerator.num_processes
        studies = sum(len(b.names) for b in batches) * processes
        trunk = self.accelerator.unwrap_model(self.model).visual.trunk
        tokens = sum(trunk.num_tokens(b.images) for b in batches) * processes
        speed = {"studies/s": studies / seconds, "tokens/s": tokens / seconds}
        line = f"loss {loss:.3f}, {speed['studies/s']:.1f} studies/s, {speed['tokens/s']:.0f} tokens/s"
        bar.set_postfix_str(line, refresh=False)
        bar.update(1)
        if self.writer is not None:
            for name, value in {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], **speed}.items():
                self.writer.add_scalar(f"train/{name.replace('/', '_per_')}", value, self.step)

    # ------------------------------------------------------------------ evaluation and saving

    def evaluate(self, bar=None) -> Metrics | None:
        """Zero-shot metrics on the validation studies, from the main process; the others wait and get ``None``.

        Also ``None``, and a warning, when there is no result: no study can be read, or scores are not finite. Random
        numbers afterwards are as if nothing had been evaluated.
        """
        if self.validation is None:
            return None
        metrics = None
        if self.accelerator.is_main_process:
            before = random_state(self.accelerator.device)
            try:
                metrics = self._validate(bar)
            except ValueError as error:  # the weights are saved; training them further may well be worth while
                log.warning("step %d: not evaluated: %s", self.step, error)
            finally:
                set_random_state(before, self.accelerator.device)
        self._wait()
        return metrics

    def _validate(self, bar) -> Metrics:
        model = self.accelerator.unwrap_model(self.model)
        metrics = self.validation.run(model, self.tokenizer, self.accelerator.device)
        best = keep_best(self.folder, model.state_dict(), metrics.macro_auc, self.step, self.validation.fingerprint)
        self._say(
            bar, f"step {self.step}: zero-shot macro AUC {metrics.macro_auc:.3f} on {metrics.num_studies} studies"
            + ", the best so far" * best,
        )  # fmt: skip
        if self.writer is not None:
            self.writer.add_scalar("zero_shot/macro_auc", metrics.macro_auc, self.step)
            self.writer.add_scalar("zero_shot/macro_balanced_accuracy", metrics.macro_balanced_accuracy, self.step)
        return metrics

    def save(self) -> None:
        """Writes weights and state, once for all processes; an interrupted write leaves the last good ones.

        Raises:
            OSError: they cannot be written, e.g. because the disk is full.
        """
        from accelerate.utils import gather_object

        self.saved = time.monotonic()
        random_states = gather_object([random_state(self.accelerator.device)])
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            state = {
                "step": self.step,
                "total_steps": self.total_steps,
                "model": model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random_states": random_states,
                "studies": self.studies,
            }
            save_state(self.folder, state, model.state_dict())
        self._wait()

    def resume(self) -> bool:
        """Goes on from the folder's state. Returns whether there was one.

        Raises:
            ValueError: the state belongs to a run with another number of steps, or another model; or not every process
                finds the same one.
        """
        path = self.folder / "state.pt"
        found = path.is_file()
        if found:
            self._restore(path)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(f"the processes find different states in {path} (steps {steps}): all need to see one folder")
        return found

    def _restore(self, path: Path) -> None:
        state = load_state(path)
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"{path} was saved for {state['total_steps']} steps, this config makes {self.total_steps}: resume with the "
                "same data, batch size, epochs and processes, or start a new run from its weights (model.checkpoint)"
            )
        model, saved = self.accelerator.unwrap_model(self.model), state["model"]
        own = model.state_dict()
        for name in {**own, **saved}:
            there, here = (tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (saved, own))
            if there != here:
                raise ValueError(f"{path} is the state of another model: {name} is {there} there, {here} here")
        model.load_state_dict(saved)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:  # other parameters are trained
            raise ValueError(f"{path} does not fit what this config trains (model.lock_text, model.loss?): {error}") from error
        states = state.get("random_states", ())  # one for each process
        if len(states) == self.accelerator.num_processes:
            set_random_state(states[self.accelerator.process_index], self.accelerator.device)
        if self.accelerator.is_main_process and state.get("studies", self.studies) != self.studies:
            log.warning(
                "%s was saved while training on other studies: some of this epoch may be seen twice or not at all", path
            )
        self.step = state["step"]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine to 0."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW; as published, vectors and scalars, norms, biases and logit scales do not decay."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (rest if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
