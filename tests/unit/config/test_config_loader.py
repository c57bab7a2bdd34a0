"""TOML, inheritance, overrides and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest

from lt2titan.config.job import JobConfig
from lt2titan.config.loader import ConfigFileError, from_toml, load_config, to_toml
from lt2titan.config.section import ConfigError
from lt2titan.config.training import TrainingConfig
from lt2titan.model.config import HybridConfig, ModelConfig
from lt2titan.model.mixers.config import MixersConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))
ABLATIONS = [
    *(f"pure_{mixer}" for mixer in MixersConfig.names()),
    *(f"hybrid_full_{mixer}" for mixer in MixersConfig.names() if mixer not in ("full", "gdn")),  # gdn: the flagship
    "hybrid_gdn_dsa",
    "ratio_1to1",
    "ratio_1to6",
    "ratio_1to12",
    "bookend",
    "front",
    "back",
    "loop_coarse_to_fine",
    "loop_fine_to_coarse",
    "unlooped",
    "no_residual_gate",
    "no_output_gate",
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m lt2titan.config`` as run_train.sh does."""
    return subprocess.run(
        [sys.executable, "-m", "lt2titan.config", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment},
    )


def test_precedence_is_command_line_then_file_then_base_then_default(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "[training]\nsteps = 5\nseq_len = 64\nlocal_batch_size = 3\n")
    child = write(tmp_path / "child.toml", 'base = "base.toml"\n[training]\nsteps = 6\nseq_len = 32\n')
    config = load_config(child, ["--training.steps", "7"])
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (7, 32, 3)
    assert config.optimizer.lr == JobConfig().optimizer.lr


def test_base_may_be_absolute_and_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    base = write(tmp_path / "a" / "base.toml", "[model]\ndim = 64\n")
    assert load_config(write(tmp_path / "child.toml", f'base = "{base}"\n')).model.dim == 64
    (tmp_path / "b").mkdir()
    assert load_config(write(tmp_path / "b" / "child.toml", 'base = "../a/base.toml"\n')).model.dim == 64


def test_circular_and_missing_bases_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'base = "b.toml"\n')
    write(tmp_path / "b.toml", 'base = "a.toml"\n')
    with pytest.raises(ConfigFileError, match="inherits from itself"):
        load_config(tmp_path / "a.toml")
    with pytest.raises(ConfigFileError, match=r"gone\.toml.*base of.*c\.toml"):
        load_config(write(tmp_path / "c.toml", 'base = "gone.toml"\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nstep = 5\n",
            r"bad\.toml: unknown key training\.step; the nearest valid key is training\.steps",
        ),
        ("[trainig]\nsteps = 5\n", r"bad\.toml: unknown key trainig\.steps; .* training\.steps"),
        ("[model.mixers.gdm]\nn_heads = 5\n", r"nearest valid key is model\.mixers\.gdn\.n_heads"),
        ("training = 5\n", r"bad\.toml: training = 5: is a table, write \[training\]"),
        ('[training]\nsteps = "5"\n', r"training\.steps = '5': must be of type int, not str"),
        ("[training]\nsteps = true\n", r"training\.steps = True: must be of type int, not bool"),
        ("[training]\nsteps = 5.5\n", r"must be of type int, not float"),
        ("[model.loop]\nwindows = [1, 'x']\n", r"model\.loop\.windows = \[1, 'x'\]: must be of type int"),
        (
            '[lr_scheduler]\ndecay_type = "cosin"\n',
            r"decay_type = 'cosin': must be one of .* did you mean 'cosine'",
        ),
        ("[training]\nsteps = 0\n", r"training\.steps = 0: must be positive \[.*bad\.toml\]"),
        (
            "[model]\ndim = 100\n[model.mixers.gdn]\nn_heads = 7\n",
            r"model\.mixers\.gdn\.n_heads = 7: .*these do",
        ),
        ("[training\n", r"bad\.toml: is no valid TOML"),
        ("[trainng]\n", r"bad\.toml: unknown key trainng; "),
    ],
)
def test_refusals_name_the_key_the_file_and_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigFileError, match=message):
        load_config(write(tmp_path / "bad.toml", text))


@pytest.mark.parametrize("recipe", ["pure_dsa", "hybrid_gdn_dsa", "hybrid_full_dsa"])
def test_recipes_of_one_key_head_run_on_two_tensor_parallel_ranks(recipe: str) -> None:
    config = load_config(
        ROOT / "train_configs" / "ablations" / f"{recipe}_1.3b.toml", ["--parallelism.tensor_parallel_degree", "2"]
    )
    assert "dsa" in config.model.layer_mixers and config.model.mixers.dsa.n_kv_heads == 1
    config.validate_layout(2)


def test_hyphens_are_underscores(tmp_path: Path) -> None:
    file = write(tmp_path / "x.toml", "")
    assert load_config(file, ["--training.seq-len", "48"]).training.seq_len == 48
    with pytest.raises(ConfigFileError, match=r"training\.seq_len = -1: must be positive \[command line\]"):
        load_config(file, ["--training.seq-len=-1"])


def test_a_bad_value_on_the_command_line_is_blamed_on_it(tmp_path: Path) -> None:
    file = write(tmp_path / "good.toml", "")
    with pytest.raises(ConfigFileError, match=r"training\.steps = -1: must be positive \[command line\]"):
        load_config(file, ["--training.steps=-1"])


def test_a_file_that_only_the_command_line_makes_right_is_accepted(tmp_path: Path) -> None:
    file = write(tmp_path / "file.toml", "[model]\ndim = 100\n")
    with pytest.raises(ConfigFileError):
        load_config(file)
    assert load_config(file, ["--model.dim", "64"]).model.dim == 64


def test_every_field_can_be_overridden(tmp_path: Path) -> None:
    file = write(tmp_path / "empty.toml", "")
    config = load_config(
        file,
        [
            "--model.no_tie_embeddings",
            "--model.loop.windows",
            "-1",
            "8",
            "8",
            "-1",
            "--model.mixers.gdn.allow_neg_eigval",
            "--model.hybrid.mixer",
            "full",
            "--model.mixers.full.n_heads",
            "4",
            "--model.mixers.gdn.n_heads",
            "4",
        ],
    )
    assert config.model.tie_embeddings is False
    assert config.model.loop.windows == [-1, 8, 8, -1]
    assert config.model.mixers.gdn.allow_neg_eigval is True


def test_resolved_toml_reproduces_the_configuration() -> None:
    config = load_config(CONFIGS[0], ["--model.loop.windows", "-1", "8", "8", "-1", "--optimizer.lr", "0.00012345"])
    assert asdict(from_toml(to_toml(config, header=["a comment"]), "test")) == asdict(config)


def test_warm_up_longer_than_the_horizon_is_shortened_with_a_warning(tmp_path: Path) -> None:
    file = write(tmp_path / "x.toml", "[training]\nsteps = 10\n[lr_scheduler]\nwarmup_steps = 50\n")
    config = load_config(file)
    assert config.schedule == (10, 10)
    assert "warmup_steps = 50" in config.warnings()[0]
    assert load_config(file, ["--lr_scheduler.total_steps", "100"]).warnings() == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_recipes_load(path: Path) -> None:
    load_config(path)


def test_every_ablation_exists_at_both_scales_and_changes_only_what_it_says() -> None:
    for scale in ("0.6b", "1.3b"):
        flagship = asdict(load_config(ROOT / f"train_configs/lt2_{scale}.toml"))
        for name in ABLATIONS:
            changed = asdict(load_config(ROOT / f"train_configs/ablations/{name}_{scale}.toml"))
            differing = {section for section in changed if changed[section] != flagship[section]}
            assert differing == {"job", "model"}, name
        same = asdict(load_config(ROOT / f"train_configs/ablations/hybrid_full_gdn_{scale}.toml"))
        assert {section for section in same if same[section] != flagship[section]} == {"job"}


def test_every_field_has_help() -> None:
    result = check("--help")
    assert result.returncode == 0, result.stderr
    text = result.stdout

    def walk(section: object, prefix: str) -> None:
        for field in fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            if is_dataclass(value):
                walk(value, f"{prefix}{field.name}.")
            else:
                entry = text.split(f"--{prefix}{field.name}", 1)[1].split("\n│ --", 1)[0]
                words = entry.split("(default", 1)[0].replace("│", " ").split()
                assert len(words) > 3, f"--{prefix}{field.name} has no help: {entry!r}"

    walk(JobConfig(), "")


def test_config_check_imports_no_torch() -> None:
    code = (
        "import sys, lt2titan.config.__main__ as m; sys.argv = ['x']; m.main(); "
        "assert not {'torch', 'numpy', 'datasets', 'tokenizers'} & sys.modules.keys(), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stepz", "5"], "--training.steps"),
        (["--training.steps", "x"], "invalid literal"),
        (["--training.steps", "0"], "training.steps = 0: must be positive [command line]"),
        (["--job.config_file", "none.toml"], "none.toml: cannot be read: No such file"),
        (["--job.config-file", "none.toml"], "none.toml: cannot be read: No such file"),
        (["--model.tie_embeddings", "False"], "write --model.tie_embeddings or --model.no_tie_embeddings"),
        (
            ["--training.global_batch_size", "12", "--training.local_batch_size", "8"],
            "training.global_batch_size = 12: is no multiple of local_batch_size x data-parallel ranks = 8 x 1 = 8; ",
        ),
        (["--model.vocab_size", "100"], "model.vocab_size = 100: the tokenizer 'bytes' has 258 tokens"),
        (["--parallelism.pipeline_parallel_degree", "2"], "looped stack"),
        (["--parallelism.expert_parallel_degree", "2"], "no experts"),
        (["--parallelism.tensor_parallel_degree", "2"], "tensor_parallel_degree = 2"),
        (["--parallelism.data_parallel_shard_degree", "3"], "there are 1 processes"),
        (["--data.tokenizer", "nowhere"], "data.tokenizer = 'nowhere'"),
        (["--training.dataset", "filez"], "did you mean 'files'?"),
        (["--training.dataset", "files"], "training.dataset_path = ''"),
        (["--validation.dataset", "foo"], "validation.dataset = 'foo'"),
        (["--data.streaming"], "data.streaming = True"),
        (["--data.holdout_documents", "0"], "data.holdout_documents = 0"),
    ],
)
def test_refusals_exit_with_two_and_no_traceback(arguments: list[str], message: str) -> None:
    result = check(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_batch_is_checked_against_the_processes_of_the_run() -> None:
    assert check(NGPU="2", NNODES="2").returncode == 0
    assert check(NGPU="3").returncode == 2
    assert check("--training.local_batch_size", "4", NGPU="2", NNODES="2").returncode == 2
    for wrong in ("two", "0", "-1"):
        result = check(NGPU=wrong)
        assert result.returncode == 2 and f"NGPU = '{wrong}'" in result.stderr


@pytest.mark.parametrize(
    ("local", "total", "dp_size", "expected"),
    [(4, -1, 8, (4, 1)), (4, 32, 2, (4, 4)), (0, 8, 1, (8, 1)), (0, 8, 8, (1, 1)), (0, 24, 8, (3, 1))],
)
def test_global_batch_is_divided(local: int, total: int, dp_size: int, expected: tuple[int, int]) -> None:
    training = TrainingConfig(local_batch_size=local, global_batch_size=total)
    assert training.microbatches(dp_size) == expected
    if total > 0:
        assert expected[0] * expected[1] * dp_size == total


@pytest.mark.parametrize(
    ("local", "total", "says"),
    [
        (4, 36, "global_batch_size = 36: is no multiple of local_batch_size x data-parallel ranks = 4 x 8 = 32; "),
        (4, 8, "global_batch_size = 8: is no multiple of local_batch_size x data-parallel ranks = 4 x 8 = 32; "),
        (0, 12, "global_batch_size = 12: is no multiple of the 8 data-parallel ranks; "),
    ],
)
def test_a_global_batch_that_cannot_be_divided(local: int, total: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(local_batch_size=local, global_batch_size=total).microbatches(8)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("context", "lengths", "says"),
    [
        (1, (33, 0), "training.seq_len = 33 is no multiple of tensor_parallel_degree 2; "),
        (
            4,
            (32, 20),
            "validation.seq_len = 20 is no multiple of tensor_parallel_degree 2 x context_parallel_degree 4 = 8; ",
        ),
    ],
)
def test_rows_that_are_not_split_by_tokens(context: int, lengths: tuple[int, int], says: str) -> None:
    config = JobConfig(model=ModelConfig(mixer="full", hybrid=HybridConfig()))
    config.training.seq_len, config.validation.seq_len = lengths
    config.training.global_batch_size = -1
    config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree = 2, context
    with pytest.raises(ConfigError) as caught:
        config.validate_layout(2 * context)
    assert str(caught.value).startswith(f"parallelism.sequence_parallel = True: {says}")
    config.parallelism.sequence_parallel = False
    config.validate_layout(2 * context)
