"""A run: the loop around the step, its checkpoints, its samples, and what happens when something goes wrong."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dcgan import checkpoint as checkpoints
from dcgan.average import Average
from dcgan.batches import Batches, Noise, derived_seed
from dcgan.checkpoint import Checkpoint, CheckpointError
from dcgan.config import Config
from dcgan.data import ImageSet
from dcgan.errors import InputError, RunError, out_of_memory
from dcgan.grid import save_grid
from dcgan.loop import Loop, make_step
from dcgan.model import Discriminator, Generator
from dcgan.progress import MetricsLog, Progress
from dcgan.signals import StopOnSignal
from dcgan.step import METRICS
from dcgan.stopwatch import Stopwatch

SAMPLES = 64
ROLLBACKS = 3


class NotFinite(ArithmeticError):
    """A loss or a weight became NaN or infinite."""


class Trainer:
    """Everything a run holds in memory, and the loop over it.

    Args:
        config: resolved settings.
        run: the run's directory; `config.json` is already there.
        images: the training set.
        say: where messages to the user go.
        claim: the run directory's lock, held as long as this object lives.
    """

    def __init__(
        self, config: Config, run: Path, images: ImageSet, say: Callable[[str], None], claim: IO | None = None
    ):
        self.config, self.run, self.say, self.claim = config, run, say, claim
        device = self.device = torch.device(config.device)
        self.step = self.rollbacks = 0
        self.clock = Stopwatch(device)

        initial = torch.Generator().manual_seed(derived_seed(config.seed, "weights"))
        self.generator = Generator(config.arch, initial).to(device)
        self.discriminator = Discriminator(config.arch, initial).to(device)
        parts = make_step(config, self.generator, self.discriminator)
        self.update, self.optimizer_g, self.optimizer_d = parts
        self.average = None
        if config.ema:  # made after the step, so that the average has the weights' memory format
            self.average = Average(self.generator, config.ema)
        self.batches = Batches(images.images, config.batch_size, config.seed, config.flip, device, config.channels_last)
        self.noise = Noise(config.nz, config.seed, device)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        parts = (self.update, self.batches, self.noise, self.average, self.sums)
        self.loop = Loop(*parts, config.cuda_graph, config.strict, say)
        self.summed = 0
        self.metrics = MetricsLog(run / "metrics.jsonl", run / "tensorboard" if config.tensorboard else None)
        self.saved: Path | None = None

    # State: what a checkpoint holds

    def _models(self) -> dict[str, dict[str, Tensor]]:
        models = {"generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict()}
        if self.average is not None:
            models["generator_ema"] = self.average.module.state_dict()
        return models

    def snapshot(self) -> Checkpoint:
        """The run's state after `step` steps."""
        state = {
            "optimizer_g": checkpoints.optimizer_state(self.generator, self.optimizer_g),
            "optimizer_d": checkpoints.optimizer_state(self.discriminator, self.optimizer_d),
            "averaged": self.average.count if self.average is not None else None,
            "noise": {"device": self.device.type, "state": self.noise.generator.get_state()},
            "step": self.update.state_dict(),
            "sums": self.sums.cpu(),
            "summed": self.summed,
            "rollbacks": self.rollbacks,
            "seconds": self.clock.seconds,
        }
        return Checkpoint(self.step, self.config.arch, self._models(), state)

    def restore(self, saved: Checkpoint) -> None:
        """Take the state of `saved` for this run's own."""
        state = saved.state
        self.step, self.rollbacks = saved.step, state["rollbacks"]
        self.clock = Stopwatch(self.device, state["seconds"])
        self.generator.load_state_dict(saved.models["generator"])
        self.discriminator.load_state_dict(saved.models["discriminator"])
        if self.average is not None:
            self.average.module.load_state_dict(saved.models["generator_ema"])
            self.average.count = int(state["averaged"])
        checkpoints.load_optimizer_state(self.generator, self.optimizer_g, state["optimizer_g"])
        checkpoints.load_optimizer_state(self.discriminator, self.optimizer_d, state["optimizer_d"])
        self.update.load_state_dict(state["step"])
        if state["noise"]["device"] == self.device.type:
            self.noise.generator.set_state(state["noise"]["state"])
        else:
            self.noise.restart(self.step)
            self.say(f"the noise of this run was drawn on {state['noise']['device']}: a new stream begins here")
        self.sums.copy_(state["sums"])
        self.summed = state["summed"]

    def save(self, last: bool = False) -> None:
        """Write a checkpoint and prune; a full disk is reported and survived, and the next save tries again.

        Args:
            last: nothing comes after it; then room is made by removing all but the newest of the earlier ones, and
                if that does not help either, the run has failed.

        Raises:
            NotFinite: a loss or a weight is NaN or infinite, which must never replace a good checkpoint.
            RunError: the last one could not be written.
            OSError: the first one could not be written.
        """
        if self.saved is not None and checkpoints.step_of(self.saved) == self.step:
            return
        self._finite_sums()
        snapshot = self.snapshot()
        for name, tensors in snapshot.models.items():
            for key, value in tensors.items():
                if not torch.isfinite(value).all():
                    raise NotFinite(f"{name} {key} is not finite by step {self.step}")
        folder = self.run / "checkpoints"
        try:
            self.saved = checkpoints.save(folder, snapshot, self.config.keep)
        except OSError as error:
            if self.saved is None:
                raise
            why = f"checkpoint of step {self.step} not written ({error.strerror})"
            if not last:
                self.say(f"warning: {why}; the last one is {self.saved.name}; training goes on")
                return
            checkpoints.prune(folder, 1, checkpoints.step_of(self.saved))
            try:
                self.saved = checkpoints.save(folder, snapshot, self.config.keep)
            except OSError:
                raise RunError(f"{why}; the last checkpoint is {self.saved}") from error

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; from the beginning where the run was killed before its first.

        Raises:
            InputError: none is whole, or it is of another architecture.
        """
        folder = self.run / "checkpoints"
        checkpoints.remove_partial(folder)
        if not checkpoints.steps(folder):
            self.metrics.truncate_after(-1)
            self.start()
            return
        try:
            saved, rejected = checkpoints.newest(folder)
        except CheckpointError as error:
            raise InputError(f"--resume {self.run}: {error}") from None
        for reason in rejected:
            self.say(f"warning: passed over {reason}")
        if saved.arch != self.config.arch:
            raise InputError(
                f"--resume {self.run}: its checkpoint has {saved.arch}, its config.json {self.config.arch}"
            )
        try:
            self._continue_from(saved)
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"--resume {self.run}: its checkpoint does not fit its config.json ({error})") from None

    def _continue_from(self, saved: Checkpoint) -> None:
        self.restore(saved)
        folder = self.run / "checkpoints"
        self.saved = folder / f"{checkpoints.PREFIX}{saved.step:08d}"
        checkpoints.abandon_after(folder, saved.step)
        self.metrics.truncate_after(saved.step)

    # The loop

    def start(self) -> None:
        """Begin a run: the checkpoint of step 0, to which a rollback can always go, and a picture of real data."""
        self.save()
        save_grid(self.run / "samples" / "real.png", self.batches(0)[:SAMPLES])

    def train(self) -> int | None:
        """Train until `config.steps`, or until a signal; then checkpoint.

        Returns:
            The number of the signal that stopped it, or None.

        Raises:
            RunError: it could not go on; the message names the last checkpoint.
        """
        with StopOnSignal() as stop, Progress(self.config.steps, self.step, self.batches.per_epoch) as progress:
            self.say = self.loop.say = progress.message
            while True:
                try:
                    self._train(stop, progress)
                    return stop.number
                except NotFinite as error:
                    self._roll_back(error)
                except (RuntimeError, MemoryError) as error:
                    self._explain(error)
                    raise

    def _train(self, stop: StopOnSignal, progress: Progress) -> None:
        config, clock = self.config, self.clock
        clock.start()
        while self.step < config.steps and stop.number is None:
            clock.images += self.loop(self.step, self.rollbacks)
            self.step += 1
            self.summed += 1
            progress.advance(self.step)
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._log(progress)
            if last or self.step % config.sample_every == 0:
                with clock.paused():
                    self.sample()
            if self.step % config.checkpoint_every == 0:
                with clock.paused():
                    self.save()
        clock.stop()
        self.save(last=True)
        self.metrics.close()

    def _log(self, progress: Progress) -> None:
        """Read the interval's means from the device, the one place where the loop waits for it."""
        sums = self._finite_sums()
        means = {name: value / self.summed for name, value in zip(METRICS, sums, strict=True)}
        line = {"step": self.step, "epoch": round(self.step / self.batches.per_epoch, 4), **means}
        line |= {"images_per_s": self.clock.lap(), "seconds": self.clock.seconds}
        self.metrics.append(line)
        progress.log(line)
        self.sums.zero_()
        self.summed = 0

    def sample(self) -> None:
        """Write the grid of the fixed noise: in evaluation mode, so that it depends on no batch mates."""
        generator = self.generator if self.average is None else self.average.module
        training = generator.training
        with torch.no_grad():
            images = generator.eval()(self.noise.fixed(SAMPLES))
        generator.train(training)
        try:
            save_grid(self.run / "samples" / f"step_{self.step:08d}.png", images)
        except OSError as error:
            self.say(f"warning: samples not written ({error.strerror}); training goes on")

    # What goes wrong

    def _finite_sums(self) -> list[float]:
        """The interval's sums, read once from the device. Raises NotFinite if a loss is NaN or infinite."""
        sums = self.sums.tolist()
        if not all(map(math.isfinite, sums[:2])):
            raise NotFinite(f"loss_d or loss_g is not finite by step {self.step}")
        return sums

    def _roll_back(self, error: NotFinite) -> None:
        """Return to the last checkpoint, with another order and other noise: the same would fail the same way.

        The last one, whatever its step: a run that was stopped shortly before has a later one than an uninterrupted
        run, so these two may differ after a rollback.
        """
        failed, rollbacks = self.step, self.rollbacks
        if rollbacks == ROLLBACKS:
            raise RunError(f"{error}, after {ROLLBACKS} rollbacks; the last checkpoint is {self.saved}") from error
        try:
            saved, _ = checkpoints.newest(self.run / "checkpoints")
            self._continue_from(saved)
        except (CheckpointError, OSError) as lost:
            raise RunError(f"{error}, and no checkpoint to go back to ({lost})") from error
        self.rollbacks = rollbacks + 1
        self.noise.restart(self.step, self.rollbacks)
        self.say(f"warning: {error}; back from step {failed} to {self.step}, with new noise and order")

    def _explain(self, error: Exception) -> None:
        """Raise a RunError that tells the user what to do, where that is known."""
        last = f"the last checkpoint is {self.saved}"
        if out_of_memory(error):
            size = self.config.batch_size
            advice = f"a run with --batch-size {max(1, size // 2)} would need about half"
            raise RunError(f"out of memory at step {self.step} with batches of {size}: {advice}; {last}") from error
        of_device = isinstance(error, getattr(torch, "AcceleratorError", ()))
        if of_device or str(error).startswith(("CUDA error", "Triton Error [CUDA]")):
            raise RunError(f"the device failed at step {self.step} ({error}); {last}") from error
