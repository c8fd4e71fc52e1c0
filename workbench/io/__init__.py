"""Errors, progress, durable files, parsing of records and safetensors: the ground that every other folder stands on."""
