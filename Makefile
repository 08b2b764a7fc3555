# Every target sets up what it needs first: Debian packages, a locked Python environment, Pulumi and its plugins.
# The second time that takes a fraction of a second.

SHELL    := /bin/bash
# Those of the lab that runs; without one, virtual machines where the CPU runs them, else containers. It is asked once,
# and only where a target needs it.
MACHINES ?= $(eval MACHINES := $(shell python3 tools/setup.py machines))$(MACHINES)
STACK    ?= lab-$(MACHINES)
OUT      ?= out
RELEASE  := $(or $(RELEASE),$(POSTHORN_RELEASE))
WITHOUT  ?=
ADOPT    ?=
DELETE   ?=
PUSH     ?=
ROLL     ?=
YES      ?=
JSON     ?=
METRICS  ?=
# Of the lab's hosts; where nothing is said, that of stacks/Pulumi.lab.yaml.
export POSTHORN_RELEASE := $(RELEASE)

TOOLS   = python3 tools/setup.py run
# The lab's stacks are worked on from inside the lab, with its own back end, passphrase and SSH agent.
INSIDE  = $(if $(filter lab-vms lab-containers,$(STACK)),python -m lab operator --stack $(STACK) --)
OPS     = $(TOOLS) $(if $(filter lab-containers,$(STACK)),,--libvirt) -- $(INSIDE) python -m ops
FLAGS   = $(if $(WITHOUT),--without $(WITHOUT)) $(if $(ADOPT),--adopt $(ADOPT)) $(if $(DELETE),--delete $(DELETE)) $(if $(PUSH),--push $(PUSH)) $(if $(YES),--yes)

# What a variable holds as one word of the shell, whatever stands in it: a Message-ID is a stranger's text.
quoted = '$(subst ','\'',$(value $(1)))'
unexport WHAT SINCE RUN

.DEFAULT_GOAL := help
.PHONY: help lab lab-down lab-status lab-fail lab-heal shell load bench bench-users test test-upgrade unit lint format lock keys password tsig update-keys reference render preview up check trace ssh known-hosts refresh unlock down unprotect

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lab: ## A whole small internet on this machine, with the mail service in it (MACHINES=vms or containers, RELEASE=12 or 13)
	@$(TOOLS) --machines $(MACHINES) -- python -m lab up --machines $(MACHINES)

lab-down: ## Remove the lab, and leave nothing of it behind
	@$(TOOLS) --machines containers -- python -m lab down

lab-status: ## Sites, hosts, addresses and states of the lab
	@$(TOOLS) -- python -m lab status

lab-fail: ## Break something of the lab: WHAT="host smtp-in-oak", "site oak", "link oak-internet"
	@$(TOOLS) -- python -m lab fail $(WHAT)

lab-heal: ## Mend it again
	@$(TOOLS) -- python -m lab heal $(WHAT)

shell: ## A shell in which python -m lab, pytest and pulumi are at hand
	@$(TOOLS) --machines containers -- bash

load: ## Let the lab's people live a day in a minute: they read, write and click, and no mail may be lost (DAY="--users 100 --inbound 8")
	@$(TOOLS) --machines containers -- python -m lab load $(DAY)

bench: ## Measure replication in the lab that runs
	@$(TOOLS) --machines containers -- python -m lab bench-replication

bench-users: ## Measure sessions, logins and submissions in the lab that runs
	@$(TOOLS) --machines containers -- python -m lab bench-users

test: ## Everything: lint, types, contracts, unit tests, then the lab in containers and on emulated VMs
	@$(TOOLS) --machines vms --browser -- python -m tests.all

test-upgrade: ## The upgrade from Debian 12 to 13, host by host with mail flowing, in a lab of its own (five minutes)
	@$(TOOLS) --machines containers -- env POSTHORN_LAB=upgrade POSTHORN_RELEASE=12 pytest -v tests/upgrade

unit: ## Lint, types, contracts and unit tests only: no root, no network
	@$(TOOLS) -- python -m tests.all --only-unit

format: ## Bring the code into its form
	@$(TOOLS) -- ruff check --fix -q . && $(TOOLS) -- ruff format -q .

keys: ## Make the keys of STACK that are missing, into its stack file (ROLL=tls/host: replace one, step by step)
	@$(OPS) keys $(STACK) $(if $(ROLL),--roll $(ROLL))

password: ## Hash a password for an account
	@$(TOOLS) -- python -m ops password

tsig: ## Store the secret of the TSIG key KEY of STACK (asked for, or from standard input)
	@$(OPS) tsig $(STACK) --key $(KEY)

lock: ## Lock the Python packages that requirements.in names, with all that they need (on Debian 12, the oldest Python)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && python3 -m venv "$$folder" && \
	"$$folder/bin/pip" install -q --disable-pip-version-check pip-tools && \
	"$$folder/bin/pip-compile" -q --generate-hashes --strip-extras --allow-unsafe --no-annotate --no-header \
	--no-emit-index-url --no-emit-trusted-host -o requirements.lock requirements.in

reference: ## Write docs/reference.md, every key of a stack file, from the model
	@$(TOOLS) -- python -m ops.reference

update-keys: ## Print what the name server of STACK has to be told about its hosts, with secrets (SERVER=knot or bind)
	@$(OPS) update-keys $(STACK) --server $(or $(SERVER),knot)

render: ## Write all files of all hosts and zones of STACK below OUT: no Pulumi, network or passphrase
	@$(TOOLS) -- python -m ops render $(STACK) --out $(OUT)

preview: ## Show host, file and changed lines of what make up would do to STACK
	@$(OPS) preview $(STACK) $(FLAGS)

up: ## Bring STACK to what its file says (WITHOUT=site where one is lost, ADOPT=name/TYPE, DELETE=zone, PUSH=host where somebody changed something, YES=1)
	@$(OPS) up $(STACK) $(FLAGS)

check: ## Compare what is published, served and running with STACK (JSON=1 for machines, METRICS=file, WITHOUT=site)
	@$(OPS) check $(STACK) $(FLAGS) $(if $(JSON),--json) $(if $(METRICS),--metrics $(METRICS))

trace: ## Tell what became of a mail of STACK: WHAT=address, Message-ID or queue ID (SINCE=3h, 2d by default; WITHOUT=site)
	@$(OPS) trace $(STACK) $(FLAGS) --what=$(call quoted,WHAT) --since=$(call quoted,SINCE)

ssh: ## Go to HOST of STACK, whose key is the pinned one (RUN="command": run that there)
	@$(OPS) ssh $(STACK) --host '$(HOST)' --run=$(call quoted,RUN)

known-hosts: ## Print the SSH keys of all hosts of STACK, for ~/.ssh/known_hosts
	@$(OPS) known-hosts $(STACK)

refresh: ## Compare the state of STACK with what is there
	@$(OPS) refresh $(STACK) $(FLAGS)

unlock: ## Clear the lock and the plugins that a killed run of STACK left
	@$(OPS) unlock $(STACK)

down: ## Remove all of STACK but what is protected, and say how to remove that
	@$(OPS) down $(STACK) $(FLAGS)

unprotect: ## Let the next make down remove what holds data: NAME, as it was told there
	@$(OPS) unprotect $(STACK) --name '$(NAME)'
