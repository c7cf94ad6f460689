"""What commands read: their arguments and options, each said once."""

from typing import Annotated

import typer

# Of commands that work in run folders.
RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.steps=50.")
]
RecipesAndOverrides = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE|KEY=VALUE",
        help="Recipe files, or names of bundled ones; then overrides, for all of them.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code",
        help="Run programs that models wrote even where no sandbox can hold them.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let tokenizers of the models run their own Python code, with all that you may do.",
    ),
]
Supervise = Annotated[
    bool,
    typer.Option("--supervise", help="Run in a process of its own; where it crashes, start again and go on."),
]
Caffeinate = Annotated[
    bool, typer.Option("--caffeinate", help="Keep a Mac on power awake until the end; its display may sleep.")
]
Fit = Annotated[
    bool,
    typer.Option("--fit", help="Where memory is short, change options that leave what is learned as it is."),
]

# Of commands that let models answer; `speech.py` has the same defaults, and checks the values.
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub name, `embedded`, a run, or RUN/MODEL.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Answer this and end; may be given several times.")
]
System = Annotated[str | None, typer.Option(help="A message that opens the chat.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens with this share of the mass.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens with this share of the likeliest's chance.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn; the same seed writes the same answer.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="The switch of chat templates that have it.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Go on with the text, without the chat template.")]
