.PHONY: dev test full bench gpu-report clients docs wheel lint format

dev:      # editable install with everything that development needs
	pip install -e '.[dev,tensorboard]'
test:
	pytest python_tests
full:     # the long loops too: 100 kills per stage
	pytest python_tests --full
bench:    # every op against its rivals, appended to bench/results
	python bench/bench.py all --record
gpu-report:  # on a machine with a GPU: build, test, train and measure, in less than 8 minutes
	python bench/gpu_report.py
clients:  # the server, asked by the real OpenAI clients of four major versions and by lm-eval
	python python_tests/clients.py
docs:     # the site, into build/docs; needs pip install -e '.[docs]'
	python -m mkdocs build
wheel:    # for this Python, into dist; for every Python and both machines: cibuildwheel (docs/install.md)
	pip wheel . --no-deps -w dist
lint:
	ruff check . && ruff format --check . && bash .ci/check_objects
format:
	ruff format . && ruff check --fix . && clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/emulator/*.*
