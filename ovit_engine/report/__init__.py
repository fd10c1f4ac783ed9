"""`ovit report`: what a run's folder holds, as one page that needs no network and no script."""

from ovit_engine.report.gather import RunFolder as RunFolder
from ovit_engine.report.gather import gather as gather
from ovit_engine.report.page import render as render
