# Two commands: `make train` learns real text on this machine, `make test` runs the whole test suite.
.PHONY: setup train test test-all lint wheel
python := .venv/bin/python
# GPU kernels are installed where there is a GPU to run them.
comma := ,
extras := dev$(if $(shell nvidia-smi --list-gpus 2>/dev/null),$(comma)gpu)

# The GPU kernels in Triton's interpreter, which has to be switched on before anything imports triton.
interpreted := TRITON_INTERPRET=1 $(python) -m pytest tests/unit/kernels/test_fla_interpreter.py tests/unit/kernels/test_fla_layers.py \
	tests/unit/kernels/test_dsa_interpreter.py

setup: .venv/installed

.venv/installed: pyproject.toml
	test -x $(python) || python3 -m venv .venv
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[$(extras)]'
	touch $@

train: setup
	@run=outputs/train-$$(date +%Y%m%d-%H%M%S) && \
	env -u CONFIG_FILE ./run_train.sh --job.dump_folder $$run && \
	$(python) scripts/generate.py --checkpoint $$run --prompt "The " --max-new-tokens 160 --temperature 0.7

test: setup
	$(python) -m pytest -m "not wide"
	$(interpreted) -m "not wide"

test-all: setup
	$(python) -m pytest
	$(interpreted)

lint: setup
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

wheel: setup
	$(python) -m build --wheel
