"""What ``benchmarks/report.py`` is made of: measuring into samples, and a report made of them alone.

rounds      samples by rounds: medians, ranges, ratios inside a round       sizes     how much is measured
material    images, runtimes, one launch and its times                      machine   where all this ran
baselines   SHA-256 and exact chains, written plainly                       ceiling   two bare processes
hashing_process, first_launch, gated_process  programs that run by themselves, in processes of their own
handlers    functions that enforcement is tried on

launches, chains, startup, memory, growth, enforcement
                                              experiments: they run something and return a Group of samples
row, launch_rows, enforcement_rows, targets   what was aimed at, and what the samples say to it
accounts, page_times, profiles                where the time goes
text, writer, plot                            the report and its picture
"""
