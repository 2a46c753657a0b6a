"""What version 3 of the SageMaker SDK asks AWS for: modeltrainer_request.py FOLDER JSON, run in its environment.

JSON: {"launcher": "MPI" or "Torchrun", "configuration": {...}, "source": folder, "entry_script": name, "hosts": n,
"hyperparameters": {...}}. AWS is a stand-in in this process (moto). Written to FOLDER: request.json, the
CreateTrainingJob request, and channels/NAME, the files that the SDK uploaded for each input channel.
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
    # The stand-in cannot say what a role may do.
    "SAGEMAKER_VALIDATE_ROLE": "false",
}

import boto3
from moto import mock_aws
from sagemaker.core.helper.session_helper import Session
from sagemaker.train.configs import Compute, SourceCode
from sagemaker.train.distributed import MPI, Torchrun
from sagemaker.train.model_trainer import ModelTrainer

LAUNCHERS = {"MPI": MPI, "Torchrun": Torchrun}
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1"


def main() -> None:
    folder, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    with mock_aws():
        storage = boto3.client("s3")
        storage.create_bucket(Bucket="bucket")
        client = boto3.client("sagemaker")
        asked: dict = {}
        session = Session(boto_session=boto3.Session(), sagemaker_client=client, default_bucket="bucket")
        # No telemetry: it is a request to a host outside, which the stand-in does not know.
        quiet = {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}
        session.sagemaker_config = {"SchemaVersion": "1.0", "SageMaker": quiet}
        events = session.boto_session.events
        events.register("provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: asked.update(params))
        trainer = ModelTrainer(
            sagemaker_session=session,
            role="arn:aws:iam::123456789012:role/role",
            training_image=IMAGE,
            source_code=SourceCode(source_dir=wanted["source"], entry_script=wanted["entry_script"]),
            distributed=LAUNCHERS[wanted["launcher"]](**wanted["configuration"]),
            compute=Compute(instance_type="ml.c5.xlarge", instance_count=wanted["hosts"]),
            hyperparameters=wanted["hyperparameters"],
        )
        trainer.train(wait=False, logs=False)
        (folder / "request.json").write_text(json.dumps(asked, default=str))
        for channel in asked["InputDataConfig"]:
            where = channel["DataSource"]["S3DataSource"]["S3Uri"]
            fetch(storage, where, folder / "channels" / channel["ChannelName"])


def fetch(storage: object, where: str, folder: Path) -> None:
    """Downloads everything under an S3 prefix."""
    bucket, _, prefix = where.removeprefix("s3://").partition("/")
    for page in storage.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            file = folder / item["Key"].removeprefix(prefix).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.download_file(bucket, item["Key"], str(file))


if __name__ == "__main__":
    main()
