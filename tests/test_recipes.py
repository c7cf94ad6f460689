"""Every bundled recipe: it loads, says what it is, is named in a README, and its rows can be read."""

import re
from pathlib import Path

import pytest

from mlx_distill import bundled, recipe
from mlx_distill.data import sources
from mlx_distill.errors import RecipeError
from mlx_distill.hub import is_name
from mlx_distill.losses.menu import MENU, options_of
from mlx_distill.options import Section, Source
from mlx_distill.recipe import Recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
REAL = [file for file in FILES if "Qwen/" in file.read_text(encoding="utf-8")]
each = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(FOLDER)) for file in FILES])
each_real = pytest.mark.parametrize("file", REAL, ids=[file.stem for file in REAL])


def named_options(section: type[Section], path: str = "") -> set[str]:
    """`train.steps` and all the others, sections included; of `objective` each loss with its options."""
    found = set()
    for name, field in section.model_fields.items():
        here = f"{path}{name}"
        found.add(here)
        inner = [
            one for one in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(one)
        ]
        for one in (one for one in inner if one is not section):
            found |= named_options(one, f"{here}.")
    if not path:
        for loss in MENU:
            found |= {f"objective.{loss}", f"objective.{loss}.weight"}
            found |= {f"objective.{loss}.{option}" for option in options_of(loss)}
    return found


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def options_written(text: str) -> list[str]:
    """`section.key` wherever a text names one: in backquotes, or as an override."""
    sections = "|".join(name for name in Recipe.model_fields if name not in ("name", "seed"))
    quoted = re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)[`=]", text)
    overrides = re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z_0-9]+)+)=", text)
    return [*quoted, *overrides]


def test_there_are_recipes_for_both_tasks() -> None:
    names = {name for name, _ in bundled.list_recipes()}
    assert names == {str(file.relative_to(FOLDER).with_suffix("")) for file in FILES}
    assert names >= {
        "quickstart",
        "summarization/pocket",
        "local_model",
        "code_generation/qwen2.5-coder-7b-to-0.5b",
        "summarization/qwen3-4b-to-0.6b",
    }


@each
def test_a_recipe_loads_and_is_the_same_after_being_written_out(file: Path, tmp_path: Path) -> None:
    loaded = recipe.load(file)
    (tmp_path / "resolved.yaml").write_text(recipe.dump(loaded), encoding="utf-8")
    assert recipe.load(tmp_path / "resolved.yaml") == loaded


@each
def test_a_recipe_is_found_by_its_name(file: Path) -> None:
    """Also where the name has a dot: of `qwen2.5-coder-7b-to-0.5b`, `.5b` is no ending of a file."""
    assert bundled.find_recipe(str(file.relative_to(FOLDER).with_suffix(""))) == file


@each
def test_the_first_line_says_what_a_recipe_is(file: Path) -> None:
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith(".")
    assert all(len(line) <= 110 for line in [first, *rest])


@each
def test_a_recipe_is_named_in_a_readme(file: Path) -> None:
    readmes = [folder / "README.md" for folder in {file.parent, FOLDER}]
    texts = [readme.read_text(encoding="utf-8") for readme in readmes if readme.exists()]
    assert any(file.stem in text for text in texts), f"no README.md names {file.stem}"


@each
def test_options_in_comments_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert set(options_written(text)) <= named_options(Recipe)


@each
def test_rows_of_an_embedded_corpus_can_be_read(file: Path) -> None:
    """The first rows of every part that names a corpus; the same list, from its top."""
    for key, source in _corpora(recipe.load(file)).items():
        for row in sources.read(source.model_copy(update={"rows": 3, "start": 0}), key):
            assert row.prompt and row.completion and row.task in ("code", "summary", "exact")
            assert row.tests if row.task == "code" else row.references


@each
def test_parts_of_one_split_of_a_corpus_share_no_row(file: Path) -> None:
    """Row i of a split is one function whatever the task, so parts are apart where their numbers are."""
    parts: dict[tuple[str, str], list[range]] = {}
    seeds: dict[tuple[str, str], int] = {}  # another seed is another order of the same functions
    for key, source in _corpora(recipe.load(file)).items():
        assert source.rows is not None
        rows = range(source.start, source.start + source.rows)
        split = (source.source, source.split or sources.SPLITS[key])
        assert seeds.setdefault(split, source.seed) == source.seed
        others = parts.setdefault(split, [])
        assert all(rows.stop <= other.start or other.stop <= rows.start for other in others)
        others.append(rows)


def _corpora(loaded: Recipe) -> dict[str, Source]:
    named = {key: getattr(loaded.data, key) for key in sources.SPLITS}
    return {key: source for key, source in named.items() if source and source.source in sources.CORPORA}


@each_real
def test_a_recipe_for_real_models_names_them_and_files_of_yours(file: Path) -> None:
    loaded = recipe.load(file)
    student = loaded.student.prune.model if loaded.student.prune else loaded.student.model
    assert student and is_name(student)
    assert loaded.teacher
    named = [loaded.data.prompts, loaded.data.valid, loaded.data.test]
    if loaded.teacher.model != "student":  # self-distillation needs no labels
        assert is_name(loaded.teacher.model)
        named.append(loaded.data.train)
    assert all(source and source.source.startswith("data/") for source in named)
    assert loaded.quantize and loaded.evaluate.baseline


@each_real
def test_adapters_of_a_real_student_are_trained_not_its_bfloat16_weights(file: Path) -> None:
    """Half a unit in the last place of a bfloat16 weight of 0.02 is 6e-5: smaller steps are lost."""
    loaded = recipe.load(file)
    assert loaded.student.method == "lora" and loaded.train.learning_rate < 6e-5


@each_real
def test_logits_of_a_real_vocabulary_fit(file: Path) -> None:
    """Six float32 copies of (tokens, 151,936) in less than 8 GiB, and a longest row within the batch."""
    loaded = recipe.load(file)
    assert 6 * loaded.train.batch_tokens * 151_936 * 4 < 8 * 2**30
    assert loaded.data.max_tokens <= loaded.train.batch_tokens


@each_real
def test_a_recipe_that_was_not_run_says_so(file: Path) -> None:
    assert "NOT YET RUN" in file.read_text(encoding="utf-8").split("name:")[0]
    assert "has not been run" in (file.parent / "README.md").read_text(encoding="utf-8")


def test_a_misspelt_option_is_found_in_a_recipe_and_in_a_comment(tmp_path: Path) -> None:
    """The checks above can fail: the usual mistake, in both places."""
    text = (FOLDER / "local_model.yaml").read_text(encoding="utf-8").replace("warmup:", "warm_up:")
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"unknown key `train\.warm_up`; did you mean `train\.warmup`"):
        recipe.load(tmp_path / "wrong.yaml")
    assert options_written("see `train.warm_up`, or train.stepz=3") == ["train.warm_up", "train.stepz"]
    assert not {"train.warm_up", "train.stepz"} & named_options(Recipe)
    assert {"train.warmup", "student.shape.head_dim", "objective.forward_kl.temperature"} <= named_options(
        Recipe
    )
