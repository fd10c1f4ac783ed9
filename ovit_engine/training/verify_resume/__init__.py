"""Check that a training under a recipe can be killed and resumed: the result must be the same, bit for bit."""

from ovit_engine.training.verify_resume.killed_and_unbroken import Restart, Verdict, verify_resume
from ovit_engine.training.verify_resume.resumable_loop import Job, Setup
from ovit_engine.training.verify_resume.state_differences import Difference, state_differences

__all__ = ["Difference", "Job", "Restart", "Setup", "Verdict", "state_differences", "verify_resume"]
