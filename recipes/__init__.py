"""Our recipes, as YAML: `ovit recipes` lists them, `Recipe.load(name)` reads one."""
