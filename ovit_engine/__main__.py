"""`python -m ovit_engine` is `ovit`."""

from ovit_engine.cli import main

if __name__ == "__main__":
    main(prog_name="ovit")
