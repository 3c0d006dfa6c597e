"""The files of cluster/, by what can be checked without a cloud: versions, schemas, shell, entrypoints, tokens."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from raymeta import cli
from raymeta.cli.group import source_and_overrides
from raymeta.config import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
README = CLUSTER / "README.md"
LAUNCHERS = sorted(CLUSTER.glob("launcher/*.yaml"))
MANIFESTS = sorted(CLUSTER.glob("kubernetes/*.yaml"))
SCRIPTS = sorted([*CLUSTER.rglob("*.sbatch"), *CLUSTER.rglob("*.sh")])
SBATCH = CLUSTER / "slurm" / "train.sbatch"
DASHBOARD = CLUSTER / "grafana" / "raymeta.json"
# What raymeta reports through ray.util.metrics, which puts `ray_` before each name.
GAUGES = {
    "raymeta_outer_step", "raymeta_tasks_per_second", "raymeta_train_loss", "raymeta_validation_metric",
    "raymeta_step_seconds", "raymeta_worker_restarts_total", "raymeta_stragglers_total",
}  # fmt: skip
STEP_PARTS = {"broadcast", "compute", "gather", "add", "update"}


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{package} is not in constraints.txt"
    return found[1]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_all_files_are_found():
    assert names(LAUNCHERS) == ["aws.yaml", "gcp.yaml", "onprem.yaml"]
    assert names(MANIFESTS) == ["raycluster.yaml", "rayjob.yaml"]
    assert SBATCH in SCRIPTS


# Versions


def test_image_tags_ray_versions_and_constraints_agree():
    ray = pinned("ray")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    texts = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file()}
    stock = [(path.name, tag) for path, text in texts.items() for tag in re.findall(r"rayproject/ray:(\S+)", text)]
    assert {name for name, _ in stock} == {"Dockerfile", "aws.yaml", "gcp.yaml"}
    assert {tag for _, tag in stock} == {f"{ray}-py311"}
    own = [tag for text in texts.values() for tag in re.findall(r"registry\.example\.com/raymeta:(\S+)", text)]
    assert len(own) >= 6
    assert set(own) == {f"{version}-ray{ray}"}
    assert {cluster_spec(load(path))["rayVersion"] for path in MANIFESTS} == {ray}
    assert f"Ray {ray}" in texts[README]
    wheels = re.findall(r"raymeta-([\d.]+)-py3", texts[README])
    assert set(wheels) == {version}


def test_the_image_holds_what_the_package_is_built_from():
    copied = re.findall(r"^COPY \S+ (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    files = " ".join(copied).split()
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "raymeta"} == set(files)
    admitted = re.findall(r"^!(\S+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(admitted) == set(files)


# Launcher files, by Ray's own validation


@pytest.mark.parametrize("path", LAUNCHERS, ids=names(LAUNCHERS))
def test_launcher_files_pass_rays_own_validation(path: Path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(path))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert prepared["max_workers"] >= 1


@pytest.mark.parametrize("path", LAUNCHERS, ids=names(LAUNCHERS))
def test_launcher_files_bring_the_token_and_what_there_is(path: Path):
    config = load(path)
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    sources = {source for source in config["file_mounts"].values() if not source.startswith("~")}
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


@pytest.mark.parametrize("path", LAUNCHERS, ids=names(LAUNCHERS))
def test_commands_of_launcher_files_are_bash(path: Path):
    config = load(path)
    lines = [line for key, value in config.items() if key.endswith("commands") for line in value]
    assert lines
    for line in lines:
        found = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, timeout=20)
        assert found.returncode == 0, f"{line}: {found.stderr}"


# Manifests, by the rules of KubeRay's schema (ray.io/v1) and of its operator's own checks, for the fields used here

QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
DNS_LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these properties and no others: an unknown field is one that the API server drops."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


RESOURCES = {"type": "object", "required": ["cpu", "memory"], "additionalProperties": QUANTITY}
PORT = closed({"name": DNS_LABEL, "containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})
CONTAINER = closed(
    {
        "name": DNS_LABEL,
        "image": {"type": "string", "pattern": r"^[a-z0-9./-]+:[A-Za-z0-9._-]+$"},
        "resources": closed({"requests": RESOURCES, "limits": RESOURCES}),
        "volumeMounts": listed(closed({"name": DNS_LABEL, "mountPath": {"type": "string", "pattern": "^/"}})),
    },
    {"ports": listed(PORT)},
)
TOLERATION = closed(
    {"key": {"type": "string"}, "operator": {"enum": ["Exists"]}, "effect": {"enum": ["NoSchedule", "NoExecute"]}}
)
MEMORY_VOLUME = closed({"medium": {"const": "Memory"}, "sizeLimit": QUANTITY})
POD = closed(
    {
        "containers": listed(CONTAINER),
        "volumes": listed(closed({"name": DNS_LABEL, "emptyDir": MEMORY_VOLUME})),
    },
    {"restartPolicy": {"const": "Never"}, "tolerations": listed(TOLERATION)},
)  # fmt: skip
TEMPLATE = closed({"spec": POD})
COUNT = {"type": "integer", "minimum": 0}
WORKER_GROUP = closed(
    {
        "groupName": DNS_LABEL, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
        "rayStartParams": TEXTS, "template": TEMPLATE,
    }
)  # fmt: skip
RAY_CLUSTER = closed(
    {
        "rayVersion": {"type": "string"},
        "authOptions": closed({"mode": {"const": "token"}}),
        "headGroupSpec": closed(
            {"rayStartParams": TEXTS, "template": TEMPLATE}, {"serviceType": {"const": "ClusterIP"}}
        ),
        "workerGroupSpecs": listed(WORKER_GROUP),
    },
    {
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": closed({}, {"idleTimeoutSeconds": COUNT}),
    },
)
RAY_JOB = closed(
    {"entrypoint": {"type": "string"}, "rayClusterSpec": RAY_CLUSTER, "backoffLimit": COUNT},
    {
        "entrypointResources": {"type": "string"},
        "runtimeEnvYAML": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
    },
)


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_manifests_follow_the_schema(path: Path):
    manifest = load(path)
    kinds = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}
    jsonschema.validate(
        manifest,
        closed(
            {
                "apiVersion": {"const": "ray.io/v1"},
                "kind": {"enum": list(kinds)},
                "metadata": closed({"name": DNS_LABEL}),
                "spec": kinds[manifest["kind"]],
            }
        ),
    )


def mebibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(Mi|Gi)", quantity).groups()
    return float(number) * {"Mi": 1, "Gi": 1024}[unit]


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_pods_have_shared_memory_and_ask_for_what_they_may_use(path: Path):
    for group in groups(load(path)):
        pod = group["template"]["spec"]
        assert [container["name"] for container in pod["containers"]] in (["ray-head"], ["ray-worker"])
        [container] = pod["containers"]
        resources = container["resources"]
        # What is more than asked for is taken away at a bad moment; of a GPU Kubernetes demands that they are equal.
        assert resources["requests"] == resources["limits"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        # Ray's object store takes 30 % of the memory, and leaves shared memory for the disk where that is smaller.
        room, memory = mebibytes(mounted["/dev/shm"]["sizeLimit"]), mebibytes(resources["limits"]["memory"])
        assert 0.3 * memory <= room <= 0.5 * memory


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_the_head_keeps_a_place_for_the_driver_and_workers_have_gpus(path: Path):
    manifest = load(path)
    head, *workers = groups(manifest)
    assert head["rayStartParams"]["num-cpus"] == "0"
    # KubeRay puts the value on a shell's command line as it is: quoted once for that, once within.
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == {"driver": 1}
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports["gcs"] == 6379
    assert ports["dashboard"] == 8265
    for worker in workers:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
        pod = worker["template"]["spec"]
        assert int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        assert {toleration["key"] for toleration in pod["tolerations"]} == {"nvidia.com/gpu"}


def test_a_training_job_is_tried_again_and_goes_on():
    manifest = load(CLUSTER / "kubernetes" / "rayjob.yaml")
    spec = manifest["spec"]
    assert spec["backoffLimit"] >= 1
    assert "--resume" in shlex.split(spec["entrypoint"])
    assert spec["shutdownAfterJobFinishes"] is True
    assert json.loads(spec["entrypointResources"]) == {"driver": 1}
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in environment.values())
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    asked = re.search(r"workers\.count=(\d+)", spec["entrypoint"])
    assert int(asked[1]) == sum(group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"])


# Shell


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_shell_scripts_are_bash(path: Path):
    found = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=20)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt-get install shellcheck)"
)
@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_shell_scripts_pass_shellcheck(path: Path):
    found = subprocess.run(["shellcheck", "--shell=bash", path], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


def readme_blocks() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    return blocks


def test_commands_of_the_readme_are_bash():
    for block in readme_blocks():
        found = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True, timeout=20)
        assert found.returncode == 0, f"{block}{found.stderr}"


# Entrypoints, by our own command line and by Ray's


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command line of a shell text, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def readme_commands() -> list[list[str]]:
    return [words for block in readme_blocks() for words in commands_in(block)]


def entrypoints() -> list[tuple[str, list[str]]]:
    """Every `python -m raymeta ...` of these files: where it stands, and its arguments."""
    texts = [("README.md", words) for words in readme_commands()]
    texts += [
        (path.name, shlex.split(load(path)["spec"]["entrypoint"]))
        for path in MANIFESTS
        if load(path)["kind"] == "RayJob"
    ]
    # What is given to the script is the command; it adds --resume itself.
    texts += [
        (where, ["-m", "raymeta", *words[words.index("cluster/slurm/train.sbatch") + 1 :], "--resume"])
        for where, words in texts
        if "cluster/slurm/train.sbatch" in words
    ]
    usage = re.search(r"^#   sbatch cluster/slurm/train.sbatch (.*)$", SBATCH.read_text(), re.MULTILINE)
    texts.append(("train.sbatch", ["-m", "raymeta", *shlex.split(usage[1]), "--resume"]))
    found = []
    for where, words in texts:
        for place in range(len(words) - 1):
            if words[place : place + 2] == ["-m", "raymeta"]:
                found.append((where, words[place + 2 :]))
    return found


ENTRYPOINTS = entrypoints()


@pytest.mark.parametrize(("where", "arguments"), ENTRYPOINTS, ids=[where for where, _ in ENTRYPOINTS])
def test_entrypoints_parse_with_our_own_command_line(where: str, arguments: list[str]):
    name, *rest = arguments
    command = cli.commands.commands[name]
    context = command.make_context(name, list(rest))
    source, overrides = source_and_overrides(context.params["arguments"])
    config = load_config(source, overrides)
    assert config.workers.backend == "ray"
    assert context.params["resume"] is True
    run_dir = context.params["run_dir"]
    # A relative one stands only where no cluster does (the README's first command).
    assert run_dir.startswith(("/", "$HOME/", "s3://")) or (where, run_dir) == ("README.md", "runs/first")


def test_all_ways_have_an_entrypoint():
    places = [where for where, _ in ENTRYPOINTS]
    assert places.count("README.md") >= 6
    assert {"rayjob.yaml", "train.sbatch"} <= set(places)


def ray_commands() -> list[list[str]]:
    lines = readme_commands()
    for path in LAUNCHERS:
        config = load(path)
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            lines += [words for line in config[key] for words in commands_in(line.replace(";", "\n"))]
    found = []
    for words in lines:
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words and Path(words[0]).name == "ray" and words[1] != "symmetric-run":
            found.append(words[1:])
    return found


def test_ray_commands_have_options_that_ray_knows():
    from ray.scripts.scripts import cli as ray_cli

    seen = set()
    for words in ray_commands():
        command: Any = ray_cli
        while isinstance(command, click.Group):
            name, *words = words
            command = command.commands[name]
        seen.add(command.name)
        command.make_context(command.name, list(words))  # parses, runs nothing; raises UsageError
    assert {"start", "submit", "stop", "up", "down", "dashboard", "launch-prometheus"} <= seen


def test_jobs_reserve_the_drivers_cores_and_time_for_a_checkpoint():
    submitted = [words for words in ray_commands() if words[:2] == ["job", "submit"]]
    assert len(submitted) >= 4
    for words in submitted:
        assert "--entrypoint-num-cpus" in words or "--entrypoint-resources" in words
        environment = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30


# Tokens


def test_ray_never_starts_without_a_token_nor_listens_on_all_addresses():
    for path in CLUSTER.rglob("*"):
        if not path.is_file():
            continue
        text = path.read_text()
        assert "0.0.0.0" not in text, path
        assert "RAY_AUTH_MODE=disabled" not in text, path
        assert not re.search(r"RAY_AUTH_TOKEN=[\"']?[A-Za-z0-9]", text), f"{path} holds a token"
    for block in readme_blocks():
        if "ray start" in block or "ray job" in block:
            assert "RAY_AUTH_MODE=token" in block
    script = SBATCH.read_text()
    assert script.index("RAY_AUTH_MODE=token") < script.index("ray symmetric-run --address")
    for words in ray_commands():
        if words[0] == "start" and "--head" in words:
            assert "--dashboard-host=127.0.0.1" in words


# The dashboard


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return queries + [entry["definition"] for entry in dashboard["templating"]["list"] if "definition" in entry]


def test_the_dashboard_shows_all_gauges_and_no_others():
    queries = " ".join(dashboard_queries())
    assert set(re.findall(r"\bray_(\w+)\{", queries)) == GAUGES
    assert set(re.findall(r'part="(\w+)"', queries)) <= STEP_PARTS
    assert set(re.findall(r"\(ray_(\w+),", queries)) <= GAUGES


def test_the_dashboard_has_a_layout_without_overlaps():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert panel["title"]
        assert panel["targets"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


# The page


def test_links_of_the_readme_lead_somewhere():
    text = README.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 10
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif "://" not in link:
            assert (CLUSTER / link).exists(), link


def test_files_named_in_commands_exist():
    named = {word for words in readme_commands() for word in words if word.startswith("cluster/")}
    assert len(named) >= 4
    assert all((ROOT / name).is_file() for name in named), named
