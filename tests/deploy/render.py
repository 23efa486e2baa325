"""`python render.py CHART`: a JSON list of values on standard input → what Helm makes of each, as JSON.

A process of its own: Helm is a Go library here, whose threads and signal handlers a test's process should not have.
An answer is {"manifests": {template: text}} or {"error": text}; the first is of `helm lint`.
"""

from __future__ import annotations

import json
import sys

import helm_python

if __name__ == "__main__":
    answers: list[dict[str, object]] = [helm_python.lint(sys.argv[1])]
    with helm_python.Chart.load(sys.argv[1]) as chart:
        for values in json.load(sys.stdin):
            try:
                answers.append({"manifests": chart.render(values, name="demo", namespace="models")})
            except helm_python.HelmError as error:
                answers.append({"error": str(error)})
    json.dump(answers, sys.stdout)
