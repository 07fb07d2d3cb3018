"""Where a step's numbers are computed: one backend per kind of device."""
