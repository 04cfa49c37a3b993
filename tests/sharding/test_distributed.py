import jax
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.sharding import distributed

NAMES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_WORKER_HOSTNAMES"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_COORDINATOR_ADDRESS"),
    *("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
)
ALL = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 2}


@pytest.fixture
def joined(monkeypatch):
    """A function that says what jax is asked to join; None where it is not asked."""

    def join(environment, **options):
        calls = []
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
        distributed.initialize(configs.default().distributed.to_dict() | options)
        return calls[0] if calls else None

    return join


def test_one_process_joins_nobody(joined):
    assert joined({}) is None
    assert joined({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_the_config_goes_before_the_environment(joined):
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    assert ALL.items() <= joined(environment).items()
    assert ALL.items() <= joined({}, **ALL).items()
    mixed = joined(environment, coordinator_address="other:2", process_id=0, heartbeat_timeout_seconds=7)
    assert mixed["coordinator_address"] == "other:2" and mixed["process_id"] == 0 and mixed["num_processes"] == 4
    assert mixed["heartbeat_timeout_seconds"] == 7


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "16"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a:1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_a_cluster_is_left_to_jax_to_find(joined, environment):
    found = joined(environment)
    assert found is not None and not ALL.keys() & found.keys()


@pytest.mark.parametrize(
    "environment, options, missing",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "num_processes .*and config.distributed.process_id"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {"num_processes": 2}, "set config.distributed.process_id"),
        ({}, {"num_processes": 2, "process_id": 0}, "set config.distributed.coordinator_address"),
    ],
)
def test_a_part_of_it_is_an_error_that_names_the_rest(joined, environment, options, missing):
    with pytest.raises(UserError, match=missing):
        joined(environment, **options)


def test_what_is_no_number_is_named(joined):
    with pytest.raises(UserError, match="JAX_PROCESS_ID=first is no whole number"):
        joined({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "first"})


def test_the_first_batch_waits_for_no_other_and_the_lead_grows_to_two():
    drawn = []
    batches = distributed.prefetch(drawn.append(number) or number for number in range(7))
    assert [(number, len(drawn)) for number in batches] == [(0, 1), (1, 3), (2, 5), (3, 6), (4, 7), (5, 7), (6, 7)]


def test_a_lead_is_there_before_the_first():
    drawn = []
    batches = distributed.prefetch((drawn.append(number) or number for number in range(5)), ahead=2, lead=2)
    assert [(number, len(drawn)) for number in batches] == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
