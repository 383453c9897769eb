"""What is coordinated: plan, driver, executors, command line. No torch; ray in one module, rich in
one module.
"""
