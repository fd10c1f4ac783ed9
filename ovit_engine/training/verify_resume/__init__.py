"""Proof that a training under a recipe can be killed and taken up again: the same result, bit for bit."""

from ovit_engine.training.verify_resume.compare import Difference as Difference
from ovit_engine.training.verify_resume.compare import differences as differences
from ovit_engine.training.verify_resume.kills import Kill as Kill
from ovit_engine.training.verify_resume.kills import plan_kills as plan_kills
from ovit_engine.training.verify_resume.loop import Job as Job
from ovit_engine.training.verify_resume.loop import ResumableSampler as ResumableSampler
from ovit_engine.training.verify_resume.loop import Setup as Setup
from ovit_engine.training.verify_resume.loop import train as train
from ovit_engine.training.verify_resume.verify import Restart as Restart
from ovit_engine.training.verify_resume.verify import Verdict as Verdict
from ovit_engine.training.verify_resume.verify import verify_resume as verify_resume
