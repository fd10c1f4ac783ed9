"""The command line: `ovit`, the same as `python -m ovit_engine`. One file a command."""

from ovit_engine.cli.bench import bench
from ovit_engine.cli.diagnose import diagnose
from ovit_engine.cli.export import export
from ovit_engine.cli.group import OvitGroup
from ovit_engine.cli.lint import lint
from ovit_engine.cli.oneshot import oneshot
from ovit_engine.cli.ptq import ptq
from ovit_engine.cli.recipes import recipes
from ovit_engine.cli.report import report
from ovit_engine.cli.show import show
from ovit_engine.cli.sweep import sweep
from ovit_engine.cli.train import train
from ovit_engine.cli.validate import validate
from ovit_engine.cli.verify import verify
from ovit_engine.cli.verify_resume import verify_resume

main = OvitGroup(
    name="ovit",
    commands=[
        validate,
        show,
        lint,
        oneshot,
        train,
        sweep,
        ptq,
        export,
        verify,
        verify_resume,
        diagnose,
        bench,
        report,
        recipes,
    ],
    help="Compress PyTorch models by recipe: prune, train int8, export a verified ONNX file.",
)
