"""The wing of those who run the course: build and execute the notebooks, report, collect evidence, measure speed."""
