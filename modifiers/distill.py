"""Learning from a teacher: its logits, its tokens, or both."""

from collections.abc import Iterable

from pydantic import Field, NonNegativeFloat, PositiveFloat, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Clock, Distillation, Row, Run, Scheduled, Time, register
from ovit_engine.distillation.losses import hard_loss, soft_loss, token_loss
from ovit_engine.distillation.teacher import OutputPair, Teacher, logits_of
from ovit_engine.distributed.comm import world
from ovit_engine.tokens import hooks_of


@register("distill")
class Distill(Distillation, Scheduled):
    """Adds to the training loss how far the model is from a teacher on the same inputs.

    The teacher is the model as training begins, before it is pruned or quantized, or `Engine(..., teacher=...)`. The
    term comes in by `loss = engine.loss(loss)` in the loop, or by `engine.attach(criterion=...)`. It costs one forward
    pass of the teacher for each of the model in training, and none in evaluation.
    """

    logits: NonNegativeFloat = Field(
        0.5, description="weight of the logits' term: KL divergence, mean over images, or cross-entropy if hard"
    )
    tokens: NonNegativeFloat = Field(
        0.0, description="weight of the mean square difference of patch tokens after the final norm; of those left"
    )
    hard: bool = Field(False, description="learn the teacher's most likely class instead of its probabilities")
    temperature: PositiveFloat = Field(
        1.0, description="softens both distributions; the term is multiplied by its square"
    )
    start: Time = Field("0ep", description="time from which the loss has the term")
    end: Time | None = Field(None, description="time until which it has; to the end of training if left out")

    _times: tuple[int, int] = PrivateAttr(default=(0, 0))
    _term: Tensor | None = PrivateAttr(default=None)  # the last one

    @model_validator(mode="after")
    def _consistent(self) -> "Distill":
        if not self.logits and not self.tokens:
            raise ValueError("'logits' and 'tokens' are both 0: nothing would be learned")
        if not self.logits and (self.hard or self.temperature != 1):
            option = "hard" if self.hard else "temperature"
            raise ValueError(f"{option!r} is of the logits' term, and 'logits' is 0: leave it out")
        if self.hard and self.temperature != 1:
            raise ValueError(f"'temperature' {self.temperature:g} softens probabilities, and 'hard' uses none")
        return self

    def _resolve(self, clock: Clock) -> tuple[int, int]:
        start = self.time_of(clock, "start")
        end = clock.total_steps if self.end is None else self.time_of(clock, "end")
        if end <= start:
            after = f"the start at {self.start!r}"
            if self.end is None:
                raise self.too_short(f"no step lies between {after} and the end of training", "start")
            raise self.error(f"{self.end!r} does not come after {after}", "end")
        return start, end

    def timeline(self, clock: Clock) -> Iterable[Row]:
        start, end = self._resolve(clock)
        kind = "teacher's classes" if self.hard else f"teacher's logits at temperature {self.temperature:g}"
        terms = [(self.logits, kind), (self.tokens, "teacher's tokens")]
        yield start, "loss", " + ".join(f"{weight:g} x {what}" for weight, what in terms if weight)
        if end < clock.total_steps:
            yield end, "loss", "no more of the teacher's"

    def prepare(self, run: Run) -> None:
        self._times = self._resolve(run.clock)
        if self.tokens:
            with self.errors_at("tokens"):
                _teacher(run).watch_tokens()

    def has_loss_term(self, step: int) -> bool:
        start, end = self._times
        return start <= step < end

    def loss_term(self, run: Run) -> Tensor | None:
        lesson = _teacher(run).outputs()
        if lesson is None:
            return None
        terms = []
        if self.logits:
            terms.append(self.logits * self._of_logits(lesson))
        if self.tokens:
            terms.append(self.tokens * self._of_tokens(run, lesson))
        term = sum(terms[1:], start=terms[0])
        self._term = term.detach()
        return term

    def step_end(self, run: Run) -> None:
        term, self._term = self._term, None
        if term is not None and run.step % run.steps_per_epoch == 0:
            of_ranks = world().gather(float(term))
            run.log(f"{self.name}/loss", sum(of_ranks) / len(of_ranks))

    def detach(self, run: Run) -> None:
        start, _ = self._times
        if run.step <= start:
            self.check_length(run, f"the teacher's term at step {start}")
            raise self.error("training ended before a step with the teacher's term was made", "start")

    def _of_logits(self, lesson: OutputPair) -> Tensor:
        try:
            student, teacher = logits_of(lesson.student.output), logits_of(lesson.teacher.output)
        except TypeError as error:
            raise self.error(str(error), "logits") from None
        if student.shape != teacher.shape:
            raise self.error(
                f"the teacher gives logits of shape {list(teacher.shape)}, the model {list(student.shape)}: give a "
                "teacher of the same classes, or tokens alone (logits: 0)"
            )
        return hard_loss(student, teacher) if self.hard else soft_loss(student, teacher, self.temperature)

    def _of_tokens(self, run: Run, lesson: OutputPair) -> Tensor:
        student, teacher = lesson.student.tokens, lesson.teacher.tokens
        if student is None or teacher is None:
            whose = "model" if student is None else "teacher"
            raise self.error(f"no tokens were seen after the {whose}'s final norm", "tokens")
        hooks = hooks_of(run.model)
        left = None if hooks is None else hooks.survivors
        origin, weight = (None, None) if left is None else (left.origin, left.weight)
        patches = student.shape[1] if hooks is None or origin is None else hooks.layout.patches
        if teacher.shape != (student.shape[0], patches, student.shape[2]):
            raise self.error(
                f"the teacher has {teacher.shape[1]} patch tokens of {teacher.shape[2]} numbers, the model {patches} "
                f"of {student.shape[2]}: give a teacher of the same, or take its logits alone",
                "tokens",
            )
        return token_loss(student, teacher, origin, weight)


def _teacher(run: Run) -> Teacher:
    assert run.teacher is not None
    return run.teacher
