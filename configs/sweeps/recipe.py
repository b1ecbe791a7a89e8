"""How much the recipe of configs/quickstart.py varies from seed to seed, and what it learns of reports of other patients.

    mg3d sweep run --config configs/sweeps/recipe.py:pretrained --workdir RUN/recipe \\
        --set data.train=RUN/train --set data.valid=RUN/valid
    mg3d sweep compare --workdir RUN/recipe

Beside it `twice`, for twice as many steps, and the control: `shuffled`, of which nothing should be learnt. Arguments, joined by
commas: `pretrained` or `scratch`, as in configs/quickstart.py; `steps=700` (default 1000); `patients=640` (default 700);
`seeds=5`, more than 3.
"""

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError


def get_config(arg: str = "pretrained") -> ConfigDict:
    words = [word for word in arg.split(",") if word]
    numbers = dict(word.split("=", 1) for word in words if "=" in word)
    names = {word for word in words if "=" not in word}
    if names - {"scratch", "pretrained"} or numbers.keys() - {"patients", "steps", "seeds"} or len(names) > 1:
        raise UserError(f"configs/sweeps/recipe.py:{arg}: scratch or pretrained, steps=N, patients=N, seeds=N")
    text = next(iter(names), "pretrained")
    sweep = ConfigDict()
    sweep.name = f"recipe-{text}"
    sweep.base = f"../quickstart.py:{text}"
    sweep.models = (("recipe", ()), ("twice", ()), ("shuffled", (("data.shuffle_reports", True),)))
    sweep.patients = (int(numbers.get("patients", 700)),)
    sweep.seeds = tuple(range(int(numbers.get("seeds", 3))))
    sweep.overrides = (
        ("training.evaluate_every", 1_000_000),  # at the end
        ("evaluations.probe.every", 1_000_000),
    )
    sweep.length = ("steps", 2 * int(numbers.get("steps", 1000)))  # of `twice`
    sweep.shares = (("recipe", 0.5), ("shuffled", 0.5))
    sweep.loss = "evaluation/auroc_macro"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep
