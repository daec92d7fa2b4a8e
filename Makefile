.PHONY: dev test full bench lint format

dev:      # editable install with everything that development needs
	pip install -e '.[dev,tensorboard]'
test:
	pytest python_tests
full:     # the long loops too: 100 kills per stage
	pytest python_tests --full
bench:    # every op against its rivals, appended to bench/results
	python bench/bench.py all --record
lint:
	ruff check . && ruff format --check . && bash .ci/check_objects
format:
	ruff format . && ruff check --fix . && clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu
