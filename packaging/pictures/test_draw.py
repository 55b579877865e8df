"""The pictures in the tree are what the script draws from the data in the tree."""

import unittest

import draw


class Pictures(unittest.TestCase):
    def test_the_pictures_are_what_the_script_draws(self):
        for name, drawn in draw.PICTURES.items():
            with self.subTest(name):
                self.assertEqual((draw.HERE / name).read_text(), drawn(), "make pictures renews it")

    def test_every_arrow_has_its_ends(self):
        names = {name for _, _, name, _ in draw.READ + draw.VALUES}
        self.assertEqual(names, {end for arrow in draw.ARROWS for end in arrow})


if __name__ == "__main__":
    unittest.main()
