"""What the fault tests share: a child that records, tools that break its disk, and a checker."""
