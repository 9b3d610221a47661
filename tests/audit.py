"""Look for known faults: of our code by bandit, of the locked packages by pip-audit.

    python tests/audit.py        in an environment of tests/audit-requirements.txt

Exits with 1 on findings. Where the service that knows of vulnerabilities cannot be reached, it says
so and goes on: an audit that did not take place is no finding.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVICES = ("pypi", "osv")
ANSWERED: dict[str, str] = {}  # id of a vulnerability -> why it does not touch us


def ask(service: str, lock: Path) -> list[dict] | None:
    """What a service says of every package in a lock file; None if it is not reached."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes"]
    command += ["--vulnerability-service", service, "--format", "json", "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit with {service}: {(done.stderr.splitlines() or ['no answer'])[-1][:200]}")
        return None


def findings(lock: Path) -> list[str] | None:
    """The vulnerabilities of the packages in a lock file; None if no service knows of them."""
    for service in SERVICES:
        packages = ask(service, lock) or []
        known = [package for package in packages if "vulns" in package]
        if not known:  # without an answer pip-audit skips a package, and is content
            continue
        print(f"{lock.name}: {len(known)} of {len(packages)} packages looked up with {service}")
        return [
            f"{package['name']} {package['version']}: {fault['id']}, mended in "
            f"{', '.join(fault['fix_versions']) or 'no release'}"
            for package in known
            for fault in package["vulns"]
            if fault["id"] not in ANSWERED
        ]
    return None


def main() -> int:
    failed = False
    for lock in sorted(HERE.glob("*.lock")):
        found = findings(lock)
        if found is None:
            print(f"*** NOT REACHED: no service told of vulnerabilities in {lock.name} ***")
        for line in found or []:
            print(f"{lock.name}: {line}")
            failed = True
    command = [sys.executable, "-m", "bandit", "-q", "-r", ".", "-c", "pyproject.toml"]
    failed |= subprocess.run(command, cwd=HERE.parent, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
