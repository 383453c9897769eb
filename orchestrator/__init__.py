"""What is coordinated: plan, driver, executors, command line. No torch; ray in three modules of
`execution`, rich in one of `reporting`.
"""
