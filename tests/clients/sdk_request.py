"""What the SageMaker SDK asks AWS for: sdk_request.py FOLDER JSON, run in the environment `sdk`.

JSON: {"estimator": "PyTorch", "source": folder, "entry_point": name, "arguments": {...}}. AWS is a stand-in in this
process (moto). Written to FOLDER: request.json, the CreateTrainingJob request, and sourcedir.tar.gz, the code that
the SDK uploaded; or error.txt, what the SDK refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}

import boto3
import sagemaker
from moto import mock_aws
from sagemaker.huggingface import HuggingFace
from sagemaker.pytorch import PyTorch
from sagemaker.tensorflow import TensorFlow

ESTIMATORS = {"PyTorch": PyTorch, "HuggingFace": HuggingFace, "TensorFlow": TensorFlow}


def main() -> None:
    folder, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="bucket")
        # No telemetry: it is a request to a host outside, which the stand-in does not know.
        session = sagemaker.Session(default_bucket="bucket")
        quiet = {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}
        session.sagemaker_config = {"SchemaVersion": "1.0", "SageMaker": quiet}
        asked: dict = {}
        session.sagemaker_client.meta.events.register(
            "provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: asked.update(params)
        )
        try:
            estimator = ESTIMATORS[wanted["estimator"]](
                entry_point=wanted["entry_point"],
                source_dir=wanted["source"],
                role="arn:aws:iam::123456789012:role/role",
                sagemaker_session=session,
                disable_profiler=True,
                debugger_hook_config=False,
                **wanted["arguments"],
            )
            estimator.fit(wait=False)
        except (ValueError, TypeError) as error:
            (folder / "error.txt").write_text(str(error))
            return
        (folder / "request.json").write_text(json.dumps(asked))
        where = json.loads(asked["HyperParameters"]["sagemaker_submit_directory"])
        bucket, _, key = where.removeprefix("s3://").partition("/")
        boto3.client("s3").download_file(bucket, key, str(folder / "sourcedir.tar.gz"))


if __name__ == "__main__":
    main()
