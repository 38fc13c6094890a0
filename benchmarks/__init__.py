"""Measurements that README's numbers come from; each script runs by itself and says what it ran on."""
