"""`ovit report`: what a run's folder holds, as one page that needs no network and no script."""

from ovit_engine.report.page import render_page as render_page
from ovit_engine.report.run_folder import RunFolder as RunFolder
from ovit_engine.report.run_folder import read_run as read_run
