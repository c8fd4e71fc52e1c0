"""Pages for people: report, feature page, token view, figures as files."""
