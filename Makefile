# The interface of this repository. Each target works on a fresh clone: it makes .venv first.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve check test exact bench bench-peers bench-router bench-trust bench-elastic bench-telemetry bench-engines chaos protos docs baseline

help:  ## show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile | expand -t 20

setup:  ## make .venv with everything (PYTHON, TORCH_INDEX)
	@bash scripts/setup.sh

demo: setup  ## start a cluster with a real model, send it prompts, show what happened, stop
	@.venv/bin/octavo demo $(ARGS)

serve: setup  ## run a cluster until Ctrl-C; ARGS="--model ... --replicas ..."
	@exec .venv/bin/octavo serve $(ARGS)

check: setup  ## format, lint, types, protobuf rules, stubs up to date, import arrows, manifests
	@bash scripts/check.sh

test: setup  ## all tests but the long ones
	@.venv/bin/python -m pytest -m "not exact" $(ARGS)

exact: setup  ## the long form of the oracle: engines, vLLM too, against plain transformers; reference tokens made anew
	@bash load_tests/engines/vllm_env.sh || echo "exact: no vLLM, its tests are skipped" >&2
	@.venv/bin/python -m pytest -m exact --timeout 1800 -o faulthandler_timeout=0 $(ARGS)

bench: setup  ## measure this machine; writes load_tests/results/
	@.venv/bin/python -m load_tests.bench $(ARGS)

bench-peers: setup  ## the same beside llama.cpp and vLLM in P=DIR, held to the bars; 1 to 2 hours on a quiet machine
	@test -n "$(P)" || { echo "bench-peers: give P=DIR, where load_tests/peers/install.sh put the peers" >&2; exit 2; }
	@.venv/bin/python -m load_tests.peers.bench "$(P)" $(ARGS)

bench-router: setup  ## the router held to its bars; 25 minutes on a quiet machine; ARGS="--bars speed,latency"
	@.venv/bin/python -m load_tests.bench_router $(ARGS)

bench-trust: setup  ## isolation, resume, several routers and what trust costs, held to their bars
	@.venv/bin/python -m load_tests.bench_trust $(ARGS)

bench-elastic: setup  ## scaling with load and nodes, changes under load, an idle cluster, held to their bars
	@.venv/bin/python -m load_tests.bench_elastic $(ARGS)

bench-telemetry: setup  ## what telemetry costs, dead collectors, whole traces, a slow step, dashboards' queries, held to their bars
	@.venv/bin/python -m load_tests.bench_telemetry $(ARGS)

bench-engines: setup  ## vLLM's tests, vLLM behind Octavo against its own server, embeddings against sentence-transformers; half an hour, quiet
	@bash load_tests/engines/vllm_env.sh
	@bash load_tests/engines/sentence_env.sh
	@test -n "$(ARGS)" || .venv/bin/python -m pytest -m exact --timeout 1800 -o faulthandler_timeout=0 tests/vllm_engine
	@.venv/bin/python -m load_tests.bench_engines $(ARGS)

chaos: setup  ## faults every 20 s under load, every answer checked; 2 x 10 minutes; ARGS="--quick"
	@.venv/bin/python -m load_tests.chaos $(ARGS)

protos:  ## rewrite the generated stubs from the .proto files
	@bash scripts/protos.sh

docs: setup  ## rewrite what follows from code: pages of docs/, Grafana's dashboards
	@.venv/bin/python -m scripts.reference
	@.venv/bin/python -m scripts.dashboards

baseline: setup  ## accept the present contract as the one that `buf breaking` compares with
	@.venv/bin/buf build protos -o protos/baseline.binpb
