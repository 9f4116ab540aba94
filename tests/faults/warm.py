"""What every process of the sweep would import and prepare for itself, once, in the process that they are forked from."""

from __future__ import annotations

import cryptography.hazmat.backends.openssl.backend  # noqa: F401
import grpc._server  # noqa: F401
import numpy.random  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
from sqlalchemy.orm import configure_mappers

import forge.pipeline  # noqa: F401
import node.agent  # noqa: F401
import tests.faults.work  # noqa: F401

configure_mappers()
