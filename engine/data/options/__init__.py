"""Options of a multiple-choice question, and what names one of them: one reader for rows of data and for what a model writes."""
