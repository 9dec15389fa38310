"""People vote blind: studies of prepared answers, a link for each rater, the page, and what the votes become."""
