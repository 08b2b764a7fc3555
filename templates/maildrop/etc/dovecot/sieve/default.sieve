# For users who have no filter of their own: their mail stays in the inbox, but for what the scripts before and after file.
keep;
