"""Tests of compiled programs, on one device, on meshes and in several processes."""
