"""Adapters through PEFT."""
