"""What the tests of the GPU check and of the GPU benchmark run in processes of their own."""
