# Two commands: `make train` learns real text on this machine, `make test` runs the whole test suite.
.PHONY: setup train test test-all lint wheel
python := .venv/bin/python
# GPU kernels are installed where there is a GPU to run them.
comma := ,
extras := dev$(if $(shell nvidia-smi --list-gpus 2>/dev/null),$(comma)gpu)

# Files of tests run side by side, with one thread in each process: with more, threads wait for those of other processes.
# `make test workers=8` where there are cores and memory for it: some tests start four ranks.
workers := 2
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -n $(workers) --dist loadfile --ignore tests/gpu
# The GPU kernels in Triton's interpreter, which has to be switched on before anything imports triton.
interpreted := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(python) -m pytest -n $(workers) tests/unit/kernels/test_fla_interpreter.py tests/unit/kernels/test_fla_layers.py \
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
	$(pytest) -m "not wide"
	$(interpreted) -m "not wide"

test-all: setup
	$(pytest)
	$(interpreted)

lint: setup
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

wheel: setup
	$(python) -m build --wheel
