"""What stands between this package and those that score."""

import logging

import torch

from knockon.evaluate.suites.bridges import quiet


def test_packages_are_kept_from_the_log_and_from_the_threads_of_torch(capsys):
    before, logger = torch.get_num_threads(), logging.getLogger("other")
    with quiet("other"):
        print("progress")
        logger.error("trouble")
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before
    assert capsys.readouterr() == ("", "")
    assert logger.level == logging.NOTSET
