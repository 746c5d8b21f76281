# Nothing but Python (>= 3.11) is needed: everything else, Postgres included, is installed into .venv.
#
#   make demo                    an order workflow that survives its worker's death
#   make test                    the tests, on the embedded Postgres
#   make test PG=DIRECTORY|URL   the same on the Postgres binaries in a directory, or on a server (URL of a superuser)
#   make test-scoped             the tests of queues and workflows, every broker on a login that may do only what the test declares
#   make test-system             the tests that need pgbouncer, redis-server, rabbitmq-server, prometheus and chromium; and
#                                Dramatiq's own tests, from its release on the package index (or from DRAMATIQ_SUITE=DIRECTORY)
#   make bench                   what a message costs, beside the peers that are installed
#   make bench-peers             installs the peers' packages, each into an environment of its own
#   make lint | soak | clean
#
# ARGS adds arguments to pytest or the benchmark: make test ARGS="-k signal -x", make bench ARGS="--only drain"

.DEFAULT_GOAL := test
.PHONY: demo test test-scoped test-system bench bench-peers soak lint clean

BIN := .venv/bin
STAMP := .venv/installed
PYTEST = DRAMATIQ_DURABLE_TEST_PG="$(PG)" $(BIN)/python -m pytest -q

demo: $(STAMP)
	@$(BIN)/python -m examples.orders.demo

test: $(STAMP)
	@$(PYTEST) -n auto --dist loadgroup $(ARGS)

test-scoped: $(STAMP)
	@DRAMATIQ_DURABLE_TEST_SCOPED=on $(PYTEST) -n auto --dist loadgroup \
		tests/broker tests/workflow tests/scenarios tests/scenarios_other tests/schedules $(ARGS)

test-system: $(STAMP)
	@$(PYTEST) -m system $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(STAMP)
	@$(BIN)/python -m benchmarks.contenders

soak: $(STAMP)
	@$(PYTEST) -m soak --timeout 0 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-bench .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@set -e; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "Python 3.11 or newer is needed, and none was found: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; \
	fi; \
	echo "Installing into .venv, with $$($$found --version) ..."; \
	$$found -m venv --clear .venv || { echo "On Debian: apt-get install python3-venv"; exit 1; }; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
