"""ovit recipes: the recipes that ship with ovit-engine."""

import click


@click.command(short_help="List our recipes, or print one.")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List our recipes with what they are, or print the one called NAME."""
    from rich.table import Table

    from ovit_engine.core.recipe import Recipe, shipped_recipes
    from ovit_engine.utils.console import table_console
    from ovit_engine.utils.suggest import suggest

    shipped = shipped_recipes()
    if name is None:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("description")
        for each, text in shipped.items():
            description = Recipe.parse(text, file=f"{each}.yaml").description
            table.add_row(each, description.partition(". ")[0].removesuffix("."))
        table_console().print(table)
        return
    if name not in shipped:
        raise ValueError(f"no recipe {name!r} of ours{suggest(name, shipped, count=3)}")
    click.echo(shipped[name], nl=False)
