"""The CUDA backend: one pool of keys and values, slot lists, work items, graphs.

pool      rows of keys and values in pages, and who holds them
tiles     which rows read which slots: the work items of a step
staging   what a step sends to the device, and what it reads back
graphs    captured decode passes, one per batch size
"""
