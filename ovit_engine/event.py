"""The five moments at which a recipe acts on training."""

from enum import Enum


class Event(Enum):
    """Where each event fires in a loop that knows nothing of us.

        engine = Engine(model, recipe, steps_per_epoch=..., epochs=...)
        engine.prepare()                     # PREPARE: surgery on modules; before DDP, FSDP2, torch.compile and EMA
        engine.attach(optimizer)             # ATTACH: the optimizer is known; what is due at step 0
        for batch in loader:
            loss(model(batch)).backward()    # any number of micro-batches
            optimizer.step()                 # STEP_BEGIN: gradients whole and unscaled, weights old
                                             # STEP_END: weights new, masks held, then pruning
        engine.detach()                      # DETACH: masks are final and exact, hooks are gone

    `attach` fires PREPARE itself where the user did not and it is still safe. A step that a gradient scaler skips fires
    neither STEP event and does not move the clock. The value of an event is the name of the method it calls.
    """

    PREPARE = "prepare"
    ATTACH = "attach"
    STEP_BEGIN = "step_begin"
    STEP_END = "step_end"
    DETACH = "detach"
