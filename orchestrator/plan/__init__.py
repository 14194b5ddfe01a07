"""Foresight: what a run needs and how fast it will be, before anything is rented. No Ray, no device.

    devices.py     data sheets, and clusters such as "4x8xH200"
    shapes.py      a model's sizes from its config.json       workload.py   how long prompts and responses are
    memory.py      bytes of one worker of each role           stages.py     who lives at once in each stage
    fit.py         the same on devices, and the knob that makes it fit
    service.py     seconds of one call of a role              calibration.py  rates measured on a device
    virtual.py     an event loop in virtual time              simulated.py  roles made of service times
    cast.py        which of them play a layout's roles        predict.py   orchestrator/loop.py run on them
    search.py      the best layouts of a cluster              text.py      all of it in words

Up to ``service.py`` nothing imports torch; the simulation runs the loop itself, and with it the loop's
records.
"""
