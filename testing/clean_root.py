"""Runs the steps of docker/Dockerfile.cpu in a clean Debian, for machines without a container engine.

`make test-docker`, as root. FROM becomes debootstrap of the release the base image is made from, with its Python; ENV,
ARG, RUN, COPY, USER and WORKDIR are done in a chroot as the file says, from a context that .dockerignore has filtered;
then a container's life is played: the image's CMD (`make demo`) through its ENTRYPOINT, HEALTHCHECK's command before,
during and after. What it cannot show: layers, the base image itself, HEALTHCHECK's schedule.

    python -m testing.clean_root [FOLDER]        keeps FOLDER/base, the Debian, for the next call, and FOLDER/root
    CLEAN_ROOT_CMD="python launcher/pretrain.py ..."  run that in place of the image's CMD
    CLEAN_ROOT_SHARE=/some/wheels:/other              folders of this machine that its pip configuration points to
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Host names, resolver: an engine gives them to a container, too. The rest: how this machine reaches packages.
SHARED = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip", "/etc/apt/apt.conf.d")
HEALTH_SECONDS = 15  # between two health checks; the file's own interval is a minute
PASSED_ON = re.compile(r"(PIP|SSL|REQUESTS|CURL)_.*|.*_(proxy|PROXY)")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (keyword, rest) of every instruction, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if word
    ]


def ignored(path: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore leaves a path out: the last pattern that matches it or a folder above decides."""
    out = False
    parts = path.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        names = parts if bare.startswith("**/") else prefixes
        if any(fnmatch.fnmatch(name, bare.removeprefix("**/")) for name in names):
            out = not pattern.startswith("!")
    return out


def context(target: Path) -> None:
    """Copy what the build would see: the repository's files that .dockerignore lets through."""
    patterns = [p for p in (ROOT / ".dockerignore").read_text().split("\n") if p.strip() and not p.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if not ignored(name, patterns) and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


class CleanRoot:
    """A Debian in a folder, and what the instructions so far have set."""

    def __init__(self, folder: Path, context_folder: Path):
        self.debian, self.folder, self.context = folder / "base", folder / "root", context_folder
        self.user, self.directory = "root", "/"
        self.variables = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
        self.variables |= {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k)}
        self.entry: list[str] = []
        self.command: list[str] = []
        self.health: list[str] = []
        self._mounts: list[Path] = []

    def base(self, image: str) -> None:
        """Make the Debian that the base image stands on."""
        version, release = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-(\w+)", image).groups()
        if not (self.debian / "usr/bin/python3").exists():
            packages = f"ca-certificates,python{version},python3-venv,python3-pip"
            run(["debootstrap", "--variant=minbase", f"--include={packages}", release, str(self.debian)])
        shutil.rmtree(self.folder, ignore_errors=True)
        run(["cp", "-a", str(self.debian), str(self.folder)])
        python = self.folder / "usr/local/bin/python"
        python.unlink(missing_ok=True)
        python.symlink_to(f"/usr/bin/python{version}")
        for share in (*SHARED, *os.environ.get("CLEAN_ROOT_SHARE", "").split(":")):
            if share and Path(share).exists():
                self._share(Path(share))
        run(["mount", "-t", "proc", "proc", self._mounted(self.folder / "proc")])
        run(["mount", "--bind", "/dev", self._mounted(self.folder / "dev")])

    def _share(self, path: Path) -> None:
        inside = self.folder / path.relative_to("/")
        if path.is_file():
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, inside)
            return
        inside.mkdir(parents=True, exist_ok=True)
        run(["mount", "--bind", "-o", "ro", str(path), self._mounted(inside)])

    def _mounted(self, path: Path) -> str:
        self._mounts.append(path)
        return str(path)

    def close(self) -> None:
        """Take away what was mounted."""
        for path in reversed(self._mounts):
            subprocess.run(["umount", "-l", str(path)], check=False)

    def shell(self, command: str) -> None:
        """Run a command as the image's user, in its directory."""
        run(self.inside(command))

    def inside(self, command: str) -> list[str]:
        """Return what runs a command as the image's user, in its directory."""
        variables = [f"{k}={v}" for k, v in self.variables.items()]
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        inside = f"cd {shlex.quote(self.directory)} && {command}"
        return [
            *("chroot", f"--userspec={self._ids()}", str(self.folder)),
            *("/usr/bin/env", "-i", *variables, f"HOME={home}", "/bin/sh", "-c", inside),
        ]

    def _ids(self) -> str:
        if self.user == "root":
            return "0:0"
        lines = (self.folder / "etc/passwd").read_text().splitlines()
        fields = next(line.split(":") for line in lines if line.startswith(f"{self.user}:"))
        return f"{fields[2]}:{fields[3]}"

    def copy(self, rest: str) -> None:
        """COPY --chown=user:group SOURCE... TARGET, files into a folder or a folder's content into one."""
        words = rest.split()
        owner = next((w.partition("=")[2].split(":")[0] for w in words if w.startswith("--chown=")), "root")
        *sources, target = [w for w in words if not w.startswith("--")]
        inside = self.folder / (self.directory.lstrip("/") if not target.startswith("/") else "") / target.lstrip("/")
        for source in sources:
            origin = self.context / source
            assert origin.exists(), f"COPY {source}: .dockerignore keeps it out of the context"
            place = inside if origin.is_dir() else inside / origin.name
            if origin.is_dir():
                shutil.copytree(origin, place, dirs_exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, place)
            run(
                [
                    "chroot",
                    str(self.folder),
                    "chown",
                    "-R",
                    f"{owner}:{owner}",
                    "/" + str(place.relative_to(self.folder)),
                ]
            )
        run(["chroot", str(self.folder), "chown", f"{owner}:{owner}", "/" + str(inside.relative_to(self.folder))])

    def volume(self, folders: list[str]) -> None:
        """Make a volume's folder as an engine does: one that the image lacks belongs to root."""
        for folder in folders:
            (self.folder / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def live(self, command: list[str]) -> None:
        """Run a container's command through the entry point, asking the health check as an engine would."""
        check = shlex.join(self.health)
        self.shell(check)
        container = subprocess.Popen(self.inside(f"exec {shlex.join([*self.entry, *command])}"))
        asked = 0
        while container.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                container.wait(timeout=HEALTH_SECONDS)
                break
            self.shell(check)
            asked += 1
        if container.returncode:
            sys.exit(f"clean_root: the container's command left with {container.returncode}")
        self.shell(f"{check} && ls runs/*/finished")
        print(f"healthy before, {asked} times during and after {shlex.join(command)}")

    def do(self, keyword: str, rest: str) -> None:
        """Carry out one instruction."""
        print(f"{keyword} {rest[:100]}", flush=True)
        if keyword == "FROM":
            self.base(rest)
        elif keyword == "RUN":
            self.shell(rest)
        elif keyword == "COPY":
            self.copy(rest)
        elif keyword == "USER":
            self.user = rest
        elif keyword == "WORKDIR":
            self.directory = rest
        elif keyword == "VOLUME":
            self.volume(json.loads(rest))
        elif keyword == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif keyword == "CMD":
            self.command = json.loads(rest)
        elif keyword == "HEALTHCHECK":
            self.health = json.loads(rest.partition("CMD ")[2])
        elif keyword in ("ENV", "ARG"):
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                value = re.sub(r"\$(\w+)", lambda found: self.variables.get(found[1], ""), value)
                if keyword == "ENV" or value:
                    self.variables[name] = value


def run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"clean_root: {shlex.join(command)[:300]} left with {done.returncode}")


def main(arguments: list[str]) -> int:
    """Build and try; return the exit code."""
    if os.geteuid() or shutil.which("debootstrap") is None:
        print("clean_root: needs root and debootstrap (apt-get install debootstrap); skipped", file=sys.stderr)
        return 0
    folder = Path(arguments[0]).absolute() if arguments else Path(tempfile.mkdtemp(prefix="clean-root-"))
    with tempfile.TemporaryDirectory() as files:
        context(Path(files))
        root = CleanRoot(folder, Path(files))
        try:
            for keyword, rest in instructions((ROOT / "docker" / "Dockerfile.cpu").read_text()):
                root.do(keyword, rest)
            root.shell("test $(id -un) = trainer")
            asked = shlex.split(os.environ.get("CLEAN_ROOT_CMD", "")) or root.command
            root.live(asked)
        finally:
            root.close()
            if not arguments:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"clean_root: every step of docker/Dockerfile.cpu ran, then {shlex.join(asked)}, healthy throughout")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
