"""Fires a recipe's events from hooks that PyTorch optimizers already have."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ovit_engine.core.agreement import Agreement
from ovit_engine.core.capabilities import (
    Coordinated,
    Deployable,
    Distillation,
    LearningRate,
    Scheduled,
    Surgical,
    having,
    timeline_rows,
)
from ovit_engine.core.checks import (
    check_arguments,
    check_claims,
    check_copy,
    check_device,
    check_made,
    check_parameters,
    check_supported,
    check_surgery,
    check_teacher,
    forget_compiled,
)
from ovit_engine.core.hooks import Attachment, StepHooks
from ovit_engine.core.loggers import Log, RateLogs, sparsities
from ovit_engine.core.loss import AddTerms, LossTerms
from ovit_engine.core.modifier import Event, Modifier
from ovit_engine.core.optimizers import layers_of
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.core.schedule import make_clock
from ovit_engine.core.state import check_state, make_state, restore_state, whole_state_dict
from ovit_engine.core.training_length import warn_of_a_late_end, warn_of_an_early_end
from ovit_engine.core.watch import StepWatch
from ovit_engine.distillation.teacher import Teacher
from ovit_engine.distributed.comm import world
from ovit_engine.distributed.sharding import reshard, sharded_modules
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.masking.parameters import Slot, parameter_slots, unwrapped
from ovit_engine.structured.shrink_model import warn_of_old_parameters
from ovit_engine.sweep.sweep import Evaluate, find_sweep
from ovit_engine.utils.copying import copy_model

if TYPE_CHECKING:
    from ovit_engine.certificate.model import Certificate

log = logging.getLogger(__name__)


class Engine:
    """Applies a recipe to a model while any loop trains it.

    Args:
        model: the model that is trained. Wrappers (DDP, torch.compile) come after `prepare`.
        recipe: a Recipe, a path, or the name of one of ours. Its modifiers are copied, so a recipe can be used again.
        steps_per_epoch: applied optimizer steps an epoch: len(loader) divided by gradient accumulation.
        epochs: how long training is.
        total_steps: the same in applied optimizer steps, in place of `epochs`, for loops that end within an epoch.
        output: the folder of this run, for recipes that leave files while they train (a sweep).
        teacher: what `distill` and its like learn from, which is frozen; a copy of the model at PREPARE if left out.

    Raises:
        RecipeError: anything in the recipe that can't be followed on this model or in this time.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str | Path,
        *,
        steps_per_epoch: int,
        epochs: int | None = None,
        total_steps: int | None = None,
        output: str | Path | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        check_made(model, recipe)
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.modifiers: tuple[Modifier, ...] = tuple(modifier.fresh_copy() for modifier in self.recipe.modifiers)
        check_teacher(teacher, model, self.modifiers)
        self._teacher = teacher
        self.run = Run(model, make_clock(steps_per_epoch, epochs, total_steps))
        self._rate_logs = RateLogs()
        self._handles: list[RemovableHandle | StepWatch | Attachment] = []
        self._stage: Event | None = None
        self._finished = False
        self._new: list[Slot] = []  # parameters that PREPARE made
        self._ema: nn.Module | None = None
        self._watch: StepWatch | None = None
        self._sharded: list[nn.Module] = []  # what fully_shard was called on
        self._device: torch.device | None = None
        timeline_rows(self.modifiers, self.run.clock)  # times past the end are errors before anything is done
        self.sweep = find_sweep(self.modifiers, self.recipe, self.run, None if output is None else Path(output))
        self._agreement = Agreement(self.recipe, self.modifiers, self.run)
        self._terms = LossTerms(self.modifiers, self.run)

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on an optimizer."""
        return self._stage is Event.ATTACH

    @property
    def finished(self) -> bool:
        """Whether training under the recipe is over: detached, or loaded from a state that was."""
        return self._finished

    @property
    def model(self) -> nn.Module:
        """The model as it was given."""
        return self.run.model

    def prepare(self) -> "Engine":
        """Fire PREPARE: all surgery on the model. Before the optimizer, DDP, FSDP2, torch.compile and EMA are made.

        Raises:
            RuntimeError: it was called before, or comes too late for this model.
        """
        if self._stage is not None:
            raise RuntimeError("engine.prepare() was called before: once is enough")
        check_surgery(self.model, self.modifiers)
        forget_compiled(self.modifiers)
        if having(self.modifiers, Distillation):
            self.run.teacher = Teacher(self.model, self._teacher)
        before = {id(parameter) for parameter in self.model.parameters()}
        self._fire(Event.PREPARE)
        for modifier in having(self.modifiers, Coordinated):
            modifier.coordinate(self.run, self.modifiers)
        self._new = [slot for slot in parameter_slots(self.model) if id(slot.tensor) not in before]
        check_claims(self.modifiers, self.run)
        for scheduled in having(self.modifiers, Scheduled):
            for line in scheduled.outcome(self.run):
                log.info("%s: %s", scheduled.name, line)
        self._stage = Event.PREPARE
        return self

    def attach(
        self,
        optimizer: Optimizer,
        *others: Optimizer,
        calibration: Calibration | None = None,
        criterion: nn.Module | None = None,
        ema: nn.Module | None = None,
        evaluate: Evaluate | None = None,
        example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    ) -> "Engine":
        """Start. `optimizer` is the clock; masks hold after the step of each.

        Args:
            optimizer: whose applied steps count time. Of a wrapper (Lookahead) those of the optimizer inside count.
            others: more optimizers of the same model.
            calibration: the source of gradients for second-order pruners.
            criterion: a loss module whose result gets the extra loss terms, in place of `engine.loss` in the loop.
            ema: an averaged copy of the model (timm's ModelEmaV3, torch's AveragedModel): it keeps the same masks.
            evaluate: measures the model that it is given; a sweep calls it before the model of a point changes.
            example_inputs: one batch that the model takes. Training and export are rehearsed with it on a copy of the
                model, on the CPU, so that what would fail at export fails now.

        Raises:
            ExportError: rehearsed, the model can't be exported, or the file would break the recipe's promise.
            RuntimeError: attached already, or the optimizer lacks parameters that PREPARE made.
            TypeError: not an Optimizer (a scheduler, or a wrapper that is none: give what is inside), or a wrong kind.
            ValueError: no optimizer trains this model.
        """
        check_arguments((optimizer, *others), criterion, ema, evaluate)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError(f"calibration must be Calibration(loader, loss_fn), not {type(calibration).__name__}")
        if self._stage not in (None, Event.PREPARE):
            raise RuntimeError("the engine is attached already, or was detached: make a new Engine for a new training")
        check_supported(self.model)
        chains = [layers_of(each) for each in (optimizer, *others)]
        optimizers, wrappers = [chain[0] for chain in chains], [w for chain in chains for w in chain[1:]]
        if any(map(StepHooks.are_on, optimizers)):
            raise RuntimeError("another engine is attached to this optimizer: detach it first")
        self._sharded = sharded_modules(self.model)
        reshard(self._sharded)
        if self._stage is None:
            self.prepare()
        if self.modifiers:
            held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
            check_parameters(self.model, held, self._new)
            warn_of_old_parameters(self.model, held)
        if example_inputs is not None and self.run.step == 0:
            self.rehearse(*optimizers, example_inputs=example_inputs)
        self._agreement.begin()
        if self.run.teacher is not None:
            self.run.teacher.check_student()
        self._device = next((parameter.device for parameter in self.model.parameters()), None)
        self.run.optimizers = optimizers
        self.run.calibration = calibration
        self._ema = None if ema is None else check_copy(unwrapped(ema), self.model)
        if self.sweep is not None:
            self.sweep.start(self._snapshot, evaluate)
        self.run.masks.place()
        self.run.masks.check_weights()
        self._change(Event.ATTACH)
        self._watch = StepWatch(optimizers[0], self.run.steps_per_epoch)
        hooks = StepHooks(self.run, write=self._write, begin=partial(self._fire, Event.STEP_BEGIN), end=self._end_step)
        self._handles = [
            self._watch,
            Attachment(self.model, self.run, self.modifiers),
            *hooks.register(optimizers[0]),
            *map(hooks.hold_after, (*optimizers[1:], *wrappers)),
        ]
        if criterion is not None:
            self._handles.append(criterion.register_forward_hook(AddTerms(self._terms)))
        self._stage = Event.ATTACH
        return self

    def rehearse(self, *optimizers: Optimizer, example_inputs: Tensor | tuple[Tensor, ...]) -> None:
        """Try training and export on a copy of the model, on the CPU, before `attach`; `attach` does so if asked.

        A time lapse of a few steps with weights pruned by magnitude, and an export that writes nothing. Model,
        optimizers and random states are as before. A model that can't be copied is not rehearsed, with a warning.

        Raises:
            ExportError: the model can't be exported, or the file would break the recipe's promise.
        """
        from ovit_engine.export.rehearsal import rehearse

        with world().fail_together():
            if world().is_main:
                rehearse(self, optimizers, example_inputs)

    def detach(self) -> None:
        """Finish: hooks go, masks are projected a last time, schedules that have not reached their end finish or raise.

        Fake quantizers stay in the model until it is exported, so that evaluation sees what will be deployed.

        Raises:
            RuntimeError: far fewer steps were applied than the recipe was resolved for (a wrong `steps_per_epoch`).
        """
        if self._stage is not Event.ATTACH:
            raise RuntimeError("engine.detach() without engine.attach()")
        self._remove_hooks()
        reshard(self._sharded)
        self.run.masks.project()  # a wrapper such as Lookahead may have brought weights back since the last step
        self._change(Event.DETACH)
        self._finished = True
        if self.sweep is not None:
            self.sweep.finish()
        if self.modifiers:
            warn_of_an_early_end(self.run)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stage is Event.ATTACH:
            if error is None:
                self.detach()
            else:  # training failed by itself: leave the user's optimizer clean and let the error through
                self._remove_hooks()
                for modifier in having(self.modifiers, Surgical):
                    modifier.abandon(self.run)

    def skip_step(self, total: int | None = None) -> None:
        """Count a step that the loop tried and its gradient scaler left out, which the engine does not see.

        It does see those of fused optimizers, which are counted once all the same. `total` sets the
        number of all skipped steps instead, for a loop that counts them itself.
        """
        if total is None:
            self.run.skip_step()
        else:
            self.run.skipped = total

    def keep(self, handle: RemovableHandle) -> None:
        """Remove this hook of an integration's where those of the engine are removed."""
        self._handles.append(handle)

    def loss(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: `loss` plus the terms of modifiers; as it is in evaluation and after detach."""
        return self._terms.add(loss)

    def metric(self, name: str, value: float) -> None:
        """Tell the engine a measured value (validation accuracy, say): it is kept beside the step in `run.history`.

        A sweep keeps the model where its metric is the best of the present sparsity.
        """
        self.run.log(name, value)
        if self.sweep is not None:
            self.sweep.metric(name, value)

    def log_to(self, log: Log, *, every: int | None = 1) -> "Engine":
        """Give `log(values, step)` what is measured, as it happens; `step` counts applied optimizer steps.

        These are the sparsity of each weight where masks change, phases, seconds of pruning and calibration, metrics,
        and after each `every` steps the learning rates that the step was made with (None: never).
        """
        if every is not None:
            self._rate_logs.add(log, every)
        self.run.logs.append(log)
        return self

    def apply_to(self, model: nn.Module) -> None:
        """Bring another copy of the model, such as an EMA copy, to the same masks and phases."""
        self.run.masks.apply_to(model)
        for modifier in having(self.modifiers, Deployable):
            modifier.apply_to(model)

    def state_dict(self) -> dict[str, Any]:
        """All that is the engine's: clock, masks as packed bits, modifier state, recipe and its hash.

        Weights and the ranges of fake quantizers are in the model's own state, momenta and learning rates in the
        optimizer's: a loop saves all three, after an optimizer step. Random numbers need no place here: what the
        engine draws depends on seeds and on the step alone.
        """
        sweep = None if self.sweep is None else self.sweep.state_dict()
        return make_state(self.recipe, self.run, self.modifiers, finished=self._finished, sweep=sweep)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Call it before `attach`, so that nothing due at step 0 happens again.

        Load the model's state after this (it fires PREPARE, which makes the quantizers that the state is of) and before
        `attach`.

        Raises:
            RuntimeError: the engine is attached already.
            ValueError: half a state, or one of another recipe, length of training or model; it says what differs.
        """
        if self._stage not in (None, Event.PREPARE):
            raise RuntimeError("load the engine's state before engine.attach(optimizer)")
        check_state(state, self.recipe, self.run.clock)
        if self._stage is None:
            self.prepare()
        restore_state(state, self.run, self.modifiers)
        if self.sweep is not None:
            self.sweep.load_state_dict(state["sweep"])
        if state["finished"]:
            self._remove_hooks()
            self._finished = True

    def export(
        self,
        path: str | Path,
        example_inputs: Tensor | tuple[Tensor, ...],
        *,
        model: nn.Module | None = None,
        data: Iterable[Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        dynamic_batch: bool = True,
    ) -> "Certificate":
        """Write the deployable ONNX file and its certificate; raises unless the file is what the recipe promises.

        Args:
            path: of the ONNX file; `<stem>.certificate.json` and `<stem>.reference.npz` are written beside it.
            example_inputs: one batch that the model takes.
            model: another copy to export (EMA) instead of the trained model.
            data: (inputs, targets) batches for parity and accuracy; without it parity is on random inputs.
            preprocessing: size [C, H, W], mean, std, crop, interpolation, for `--data` of ovit verify and diagnose.
            dynamic_batch: leave the first dimension of every input free; otherwise it is that of `example_inputs`.

        Raises:
            RuntimeError: training under the recipe is not over, the model is sharded, or not as training left it.
            ExportError: what the file fails of its promise.
        """
        from ovit_engine.export.deploy import write

        self._check_finished()
        source = self.model if model is None else model
        if sharded_modules(source):
            whole = "enter `with whole_model(engine.model):` on all ranks, and export inside it on one"
            raise RuntimeError(f"the model is sharded: {whole}")
        reference = copy_model(unwrapped(source))
        if model is not None:
            self.apply_to(reference)
        if "_original_forward" in vars(reference):  # Accelerate put one on the object that computes in half precision
            del reference.forward, reference._original_forward
        return write(
            reference,
            Path(path),
            example_inputs,
            recipe=self.recipe,
            modifiers=self.modifiers,
            masks=self.run.masks,
            data=data,
            preprocessing=preprocessing,
            dynamic_batch=dynamic_batch,
        )

    def _check_finished(self) -> None:
        """Raise RuntimeError where a file could not be what the recipe promises, since training is not over."""
        if not self.modifiers or self._finished:
            return
        where = f"the recipe is at step {self.run.step} of {self.run.total_steps}"
        if self.run.step == 0 and not self.run.optimizers:
            raise RuntimeError(f"{where}: attach an optimizer and train first")
        if self.is_attached:
            raise RuntimeError(f"{where}: call engine.detach() before export")
        raise RuntimeError(f"{where}, and training was cut short: the file could not be what the recipe promises")

    def _change(self, event: Event) -> None:
        """Fire an event at which the model may become another one."""
        until = self.run.total_steps if event is Event.DETACH else self.run.step
        if self.sweep is not None:
            self.sweep.leave(until)
            reshard(self._sharded)  # it may have evaluated
        with self._agreement.over(event):
            self._fire(event)
        if self.sweep is not None:
            self.sweep.enter(until)
        self._follow()

    def _snapshot(self) -> dict[str, Any]:
        """What a checkpoint of the present model holds, as if training ended here."""
        parts = {"model": whole_state_dict(self.model)}
        if self._ema is not None:
            parts["ema"] = whole_state_dict(self._ema)
        return {**parts, "engine": {**self.state_dict(), "finished": True}}

    def _fire(self, event: Event) -> None:
        for modifier in self.modifiers:
            log.debug("step %d: %s of %s", self.run.step, event.value, modifier.name)
            with torch.no_grad():
                getattr(modifier, event.value)(self.run)

    def _write(self) -> None:
        """A step is about to be applied, and its closure, if any, was not called yet."""
        if self._watch is not None:
            self._watch.begin_step()
        check_device(self.model, self._device)
        for modifier in having(self.modifiers, LearningRate):
            modifier.write_rates(self.run)

    def _end_step(self) -> None:
        self.run.count_step()
        self._terms.check_step()
        if self._watch is not None:
            self._watch.end_step()
        self._rate_logs.report(self.run.optimizers, self.run.step)
        reshard(self._sharded)
        self.run.masks.project()
        self._change(Event.STEP_END)
        warn_of_a_late_end(self.run)

    def _follow(self) -> None:
        """Bring the EMA copy up where masks or ranges changed: it averages what was before otherwise."""
        run = self.run
        if self._ema is not None and (
            run.masks.changed
            or self._stage is Event.DETACH
            or any(modifier.copies_are_behind(run) for modifier in having(self.modifiers, Deployable))
        ):
            self.apply_to(self._ema)
        if run.masks.changed and run.logs:
            run.report(sparsities(run.masks))
        run.masks.changed = False

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._terms.end()
        if self.run.teacher is not None:
            self.run.teacher.release()
            self.run.teacher = None
        self._stage = Event.DETACH
